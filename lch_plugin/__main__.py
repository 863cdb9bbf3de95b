"""``python -m lch_plugin`` is ``lch``."""

from lch_plugin.cli import entry_point

if __name__ == "__main__":
    entry_point()
