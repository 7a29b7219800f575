"""Changes that the package makes to libraries from outside a subclass, one file a library or a purpose."""

# Each patch names its reason, the version it was seen in ("Seen in") and the test that fails without it ("Test"). A
# patch changes the objects it is given, or acts while a context is open: importing rlhf_trl, and what it has run,
# leave the libraries as they are for everything else in the process. `warnings` and `malloc` act on the whole
# process; the command line applies them to its own.
