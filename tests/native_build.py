"""CMake builds for tests, kept in build/ from one run to the next."""

import fcntl
import platform
import subprocess
import sysconfig
from pathlib import Path
from shutil import which

REPOSITORY = Path(__file__).parents[1]
ARM = platform.machine() in ("aarch64", "arm64")
ISAS = ("portable", "neon", "dotprod") if ARM else ("portable", "avx2", "avx512", "amx")
CMAKE = which("cmake", path=sysconfig.get_path("scripts")) or "cmake"


def build(source, name, targets, *options):
    """Build targets of the CMake project in folder `source` and return the folder of the build, `build/<name>`."""
    folder = REPOSITORY / "build" / name
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:  # two workers of pytest may want the same
        fcntl.flock(lock, fcntl.LOCK_EX)
        run(CMAKE, "-S", str(REPOSITORY / source), "-B", str(folder), *options)
        run(CMAKE, "--build", str(folder), "--parallel", "2", "--target", *targets)
    return folder


def shared_library(source, options, linked):
    """Compile one C++ file and return the path of the library, in `build/`."""
    library = REPOSITORY / "build" / f"{source.parent.name}.so"
    library.parent.mkdir(exist_ok=True)
    with library.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists() or library.stat().st_mtime < source.stat().st_mtime:
            partial = library.with_suffix(".partial")
            run("g++", "-shared", "-fPIC", *options, source, "-o", partial, *linked)
            partial.rename(library)
    return library


def run(*command, **options):
    """What a program prints; it must succeed."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout[-4000:]}\n{done.stderr[-8000:]}"
    return done.stdout
