"""Runs `python -m cfjax.convert` in this process."""

import sys
from unittest import mock

from absl import flags

from cfjax.config_loading import parse_flags
from cfjax.convert import __main__ as program


def convert(source, out, *arguments):
    """Converts; arguments are further flags. Returns the path of the result."""
    before = list(flags.FLAGS)
    program.define_flags()
    argv = ["convert", f"--source={source}", f"--out={out}", *arguments]
    try:
        with mock.patch.object(sys, "argv", argv):  # where ml_collections looks too
            parse_flags(argv)
        program.main([])
    finally:
        flags.FLAGS.unparse_flags()
        flags.FLAGS.remove_flag_values([name for name in flags.FLAGS if name not in before])
    return out
