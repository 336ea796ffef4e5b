"""`python -P -m glmchat` is the same as `glmchat`."""

from glmchat.cli.main import main

if __name__ == "__main__":
    main()
