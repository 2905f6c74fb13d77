"""Why an edit acted or none did, in words."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lemoe.adaptor.state import AdaptorState
    from lemoe.inference.asking import Answer, Reply
    from lemoe.routing.router import Explanation

SCOPES = {
    "in": "in: the prompt asks for the nearest edit",
    "subject": "subject: no edit's subject is mentioned",
    "relation": "relation: something else is asked about the subject of the nearest edit",
}


def describe_route(answer: "Answer | Reply") -> str:
    """Which edits acted, and when, or why none did."""
    if answer.acted and answer.route is not None:
        later = " (later in the answer)" if answer.route.expert < 0 else ""
        return ", ".join(answer.acted) + later
    return (
        "none: no subject mentioned" if answer.nearest is None else f"none: asks something else than {answer.nearest}"
    )


def explain_route(route: "Explanation", answer: "Answer", state: "AdaptorState") -> list[tuple[str, str]]:
    """What decided the route of a prompt, by name."""
    rows = [("edit", describe_route(answer)), ("scope", SCOPES[route.scope])]
    if answer.nearest is None:
        return rows
    rows.append(("nearest", state.edits[route.edit].label if route.edit >= 0 else answer.nearest))
    if not state.router.gated:
        return rows
    by_meaning = state.settings.gate == "meaning"
    probability = f"{route.probability:.3f}" + f" (acts from {state.settings.gate_probability})" * by_meaning
    conflict = f"{route.conflict:.2f}" + f" (acts up to {state.settings.gate_conflict})" * (not by_meaning)
    return [*rows, ("probability", probability), ("conflict", conflict)]
