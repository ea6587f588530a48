import os
import sys

# Containers often set it; then each process that the tests start compiles TensorFlow's 3,000 modules anew: 10 s.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
