"""Run code in a fresh interpreter."""

import subprocess
import sys


def python(code):
    """Run code in a fresh interpreter and return the words that it prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def loaded_after(code):
    """Return the names of the modules that some code imports."""
    return set(python(f"import sys; before = set(sys.modules)\n{code}\nprint(*(set(sys.modules) - before))"))
