"""Programs that load torch for a while: each is a child that says JSON lines; imported by nobody."""
