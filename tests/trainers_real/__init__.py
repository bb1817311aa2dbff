"""Trainers that clash or weigh much: each resumes from a forecast. `make trainers` installs them; without one its test is skipped."""

import pytest

pytest.register_assert_rewrite("tests.trainers_real.course")
