#!/usr/bin/env bash
# docker/lock.sh [--upgrade]: the lock files of the images, docker/locks/*.txt, by uv.
#
# Run it after a change of the extras in pyproject.toml; --upgrade takes the newest versions. The package index is
# the one that uv is configured for, and is not written into the files.
set -euo pipefail
cd "$(dirname "$0")/.."
command -v uv > /dev/null || { echo "docker/lock.sh needs uv: pip install uv" >&2; exit 1; }

lock() {  # NAME [options of uv]: those packages that the image NAME installs, with the hashes of their files
  local name=$1
  shift
  uv pip compile --quiet --generate-hashes --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
    --custom-compile-command docker/lock.sh --output-file "docker/locks/$name.txt" "${upgrade[@]}" "$@"
}

upgrade=("$@")
serving=(--extra cli --extra data --extra demo --extra object-stores --extra serving)
# torch and the shim are installed by name: index and name alone do not tell the builds of torch apart.
cpu=(--extra cpu --excludes docker/locks/not-on-cpu.txt --no-emit-package torch)

python3 - << 'PYTHON' | lock build -
import tomllib

print("\n".join(tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"]))
PYTHON
lock gpu pyproject.toml --extra gpu --extra faiss-gpu "${serving[@]}"
lock cpu pyproject.toml "${cpu[@]}" "${serving[@]}" --no-emit-package triton
# The versions of the image that is tested are those of `cpu`.
lock test pyproject.toml "${cpu[@]}" "${serving[@]}" --extra test --constraints docker/locks/cpu.txt
