"""Other runtimes on the same weights, the same tokens and the same machine, each in an environment of its own."""
