"""What all tests share: properties are the same in every run, and how long an example takes is not one of them."""

from hypothesis import settings

settings.register_profile("trajstore", deadline=None, derandomize=True)
settings.load_profile("trajstore")
