"""What every test shares."""

from hypothesis import settings

# A test that is slow on a busy machine is not wrong; derandomised, a failure is everybody's failure.
settings.register_profile("clipstack", deadline=None, derandomize=True)
settings.load_profile("clipstack")
