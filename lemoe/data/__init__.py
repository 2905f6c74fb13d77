"""What people give: edits in every shape that files have, their conflicts, and files written whole or not at all."""
