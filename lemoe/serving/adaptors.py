"""Adaptors of one base model under names, loaded, replaced and unloaded while requests run."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lemoe.adaptor.checkpoint import AdaptorFile
from lemoe.base.loading import BaseModel
from lemoe.errors import InputError
from lemoe.inference.insertion import InsertedAdaptor, insert


class UnknownModelError(InputError):
    """A request names a model that is not served."""


class _Loaded:
    """An inserted adaptor, dormant but for the requests that chose it; taken out after the last of them."""

    def __init__(self, inserted: InsertedAdaptor):
        self.inserted = inserted
        self.requests = 0
        self.retired = False


class ServedAdaptors:
    """The base model under its own name, without edits, and adaptors under theirs.

    A request keeps the adaptor that it began with, whatever is loaded or unloaded meanwhile.
    """

    def __init__(self, base: BaseModel, *, expert_cache: int | None = None, allow_base_mismatch: bool = False):
        """Serve `base`; the other arguments are those of `insert`, for every adaptor."""
        self.base = base
        self.base_name = base.source.name
        self._expert_cache, self._allow_base_mismatch = expert_cache, allow_base_mismatch
        self._loaded: dict[str, _Loaded] = {}
        self._lock = threading.Lock()

    @property
    def names(self) -> list[str]:
        """The base's, then those of the adaptors, in the order in which they were first loaded."""
        return [self.base_name, *self._loaded]

    @property
    def default(self) -> str:
        """What a request gets that names no model: the first adaptor, or the base if there is none."""
        return self.names[1] if self._loaded else self.base_name

    def load(self, name: str, path: Path | str) -> None:
        """Load an adaptor's file under a name; requests from now on get this one instead of another with the name.

        Raises:
            InputError: if that is the base's name.
            AdaptorError: if the file is not a valid adaptor, or was made for another base model; nothing changes then.
        """
        if name == self.base_name or not name:
            raise InputError(f"an adaptor cannot be called {name!r}: that is the base model's own name")
        file = AdaptorFile(path)
        file.check_hash()
        inserted = insert(
            self.base,
            file,
            expert_cache=self._expert_cache,
            dormant=True,
            allow_base_mismatch=self._allow_base_mismatch,
        )
        loaded = _Loaded(inserted)
        with self._lock:
            replaced, self._loaded[name] = self._loaded.get(name), loaded
            self._retire(replaced)

    def unload(self, name: str) -> None:
        """Take an adaptor out, as soon as the requests that chose it are answered.

        Raises:
            UnknownModelError: if no adaptor has this name.
        """
        with self._lock:
            if name not in self._loaded:
                raise UnknownModelError(f"no adaptor is called {name!r}; there is: {', '.join(self._loaded) or 'none'}")
            self._retire(self._loaded.pop(name))

    def check_name(self, name: str | None) -> None:
        """Check that requests may name this model, or none.

        Raises:
            UnknownModelError: if nothing is served under this name.
        """
        if name not in (None, *self.names):
            raise UnknownModelError(f"the model {name!r} is not served; there is: {', '.join(self.names)}")

    @contextmanager
    def use(self, name: str | None) -> Iterator[InsertedAdaptor | None]:
        """While open, this thread's passes have the edits of the adaptor called `name`; None yields the default.

        Raises:
            UnknownModelError: if nothing is served under this name.
        """
        with self._lock:
            self.check_name(name)
            loaded = self._loaded.get(self.default if name is None else name)
            if loaded is not None:
                loaded.requests += 1
        if loaded is None:
            yield None
            return
        try:
            with loaded.inserted.acting():
                yield loaded.inserted
        finally:
            with self._lock:
                loaded.requests -= 1
                self._remove_if_done(loaded)

    def _retire(self, loaded: _Loaded | None) -> None:
        if loaded is not None:
            loaded.retired = True
            self._remove_if_done(loaded)

    def _remove_if_done(self, loaded: _Loaded) -> None:
        if loaded.retired and not loaded.requests:
            loaded.inserted.remove()
