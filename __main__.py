"""The entry of `glmchat`, and of `python -P -m glmchat`."""

import os
import sys
from typing import NoReturn

from glmchat.core import typed_ahead


def main() -> NoReturn:
    try:
        if typed_ahead.may_open_window(sys.argv[1:]) and "_GLMCHAT_COMPLETE" not in os.environ:
            typed_ahead.hold()
        from glmchat.cli.main import main as run  # takes a while

        run()
    finally:
        typed_ahead.release()


if __name__ == "__main__":
    main()
