"""`python -m lemoe` is the command `lemoe`, which runs by its name, as the library knows nothing of it."""

import runpy

if __name__ == "__main__":
    runpy.run_module("lemoe_cli", run_name="__main__", alter_sys=True)
