"""Classify photographs, such as of hands that sign digits: tracked, searched, registered and served with MLflow."""

from signdigits.startup import set_environment

set_environment()
