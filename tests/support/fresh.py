"""Run code in a fresh interpreter."""

import subprocess
import sys


def python(code):
    """Run code in a fresh interpreter and return what it prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def loaded_after(code):
    return set(python(f"import sys; before = set(sys.modules)\n{code}\nprint(*(set(sys.modules) - before))"))
