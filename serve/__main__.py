"""`python -P -m glmchat.serve`: one engine, started and watched by a face. For people there is `glmchat serve`."""

import os
import sys

from glmchat.core.errors import GlmchatError
from glmchat.serve.face import engine_loader
from glmchat.serve.run import main

if __name__ == "__main__":
    try:
        code = main(sys.argv[1:], engine_loader)
    except GlmchatError as error:
        sys.stderr.write(f"{error.message} ({error.hint})\n")
        code = error.exit
    sys.stderr.flush()
    os._exit(code)  # a thread of torch that is still busy is not worth waiting for
