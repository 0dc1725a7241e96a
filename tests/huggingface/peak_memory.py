"""The peak memory of a piece of code, in a process of its own."""

import subprocess
import sys

_WATCHED = """
import threading, time
from pathlib import Path
{setup}

def resident_mib():
    with open("/proc/self/status") as file:
        return sum(int(line.split()[1]) for line in file if line.startswith(("RssAnon", "RssFile"))) / 1024

before, peak, done = resident_mib(), 0.0, False
def watch():
    global peak
    while not done:
        peak = max(peak, resident_mib())
        time.sleep(0.002)

watcher = threading.Thread(target=watch)
watcher.start()
{code}
done = True
watcher.join()
print(peak - before)
"""


def peak_memory(setup: str, code: str) -> float:
    """MiB by which the process grows while it runs the code, after the setup; Linux alone."""
    program = _WATCHED.format(setup=setup, code=code)
    return float(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout)
