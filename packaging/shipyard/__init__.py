"""How artifacts are made: one verb a module, in the order of the flow."""
