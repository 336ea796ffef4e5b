"""Plain torch modules, one file per architecture."""
