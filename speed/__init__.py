import machine  # noqa: F401
