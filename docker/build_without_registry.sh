#!/usr/bin/env bash
# docker/build_without_registry.sh [--target cpu|test] [--base TAR_OR_IMAGE] [--folder FOLDER] [--keep] [-- COMMAND...]
#
# Builds an image of docker/Dockerfile by buildah and runs it, on a machine that reaches no container registry.
#   --target  cpu (default) or test
#   --base    what the image starts from: a tar of a root file system with Python 3.11, or the name of an image that
#             buildah can get. Default: Debian made by debootstrap, kept as FOLDER/base.tar.
#   --folder  for the base and all of buildah's storage (about 10 GB). Default: a new temporary one.
#   --keep    leaves the image and its storage; otherwise all that was made is deleted, but not a given FOLDER's base.tar
#   COMMAND   what to run in the image. Default: checks of the user, the labels and the health check, and a training
#             job on two ranks; for `test` a few test files.
# Needs root, buildah, and debootstrap for the default base. Packages come from where this machine's apt and pip are
# configured to get them.
set -euo pipefail
cd "$(dirname "$0")/.."

target=cpu base="" folder="" keep=""
while [ $# -gt 0 ]; do
  case "$1" in
    --target) target=$2; shift 2 ;;
    --base) base=$2; shift 2 ;;
    --folder) folder=$2; shift 2 ;;
    --keep) keep=yes; shift ;;
    --) shift; break ;;
    *) sed -n '2,15s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
  esac
done
fail() { echo "docker/build_without_registry.sh: $*" >&2; exit 1; }
case "$target" in cpu | test) ;; *) fail "--target $target: it is cpu or test; gpu needs a GPU to run" ;; esac
[ "$(id -u)" = 0 ] || fail "run it as root: buildah makes a root file system"
command -v buildah > /dev/null || fail "there is no buildah: apt-get install buildah"

made="" own=""
[ -n "$folder" ] || { folder=$(mktemp -d) && made=$folder; }
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
# Storage of its own, so that nothing is left in that of the machine. vfs copies all files for each layer.
driver=overlay
mkdir -p "$folder"/try/{lower,upper,work,merged}
if mount -t overlay overlay -o "lowerdir=$folder/try/lower,upperdir=$folder/try/upper,workdir=$folder/try/work" \
  "$folder/try/merged" 2> /dev/null; then umount "$folder/try/merged"; else driver=vfs; fi
rm -rf "$folder/try"
cat > "$folder/storage.conf" << CONF
[storage]
driver = "$driver"
graphroot = "$folder/storage"
runroot = "$folder/run"
CONF
export CONTAINERS_STORAGE_CONF=$folder/storage.conf BUILDAH_ISOLATION=chroot TMPDIR=$folder

container=""
clean() {
  [ -z "$container" ] || buildah rm "$container" > /dev/null || true
  [ -z "$keep" ] || { echo "== kept: CONTAINERS_STORAGE_CONF=$CONTAINERS_STORAGE_CONF buildah images"; return; }
  buildah rm --all > /dev/null 2>&1 || true
  buildah rmi --all --force > /dev/null 2>&1 || true
  rm -rf "$folder/storage" "$folder/run" "$folder/storage.conf" "$folder/pip.conf" "$folder/context"
  [ -z "$made" ] || rm -rf "$made"
}
trap clean EXIT

# ---- the base
mounts=()
if [ -z "$base" ]; then
  command -v debootstrap > /dev/null || fail "there is no debootstrap: apt-get install debootstrap, or give --base"
  base=$folder/base.tar own=yes
  if [ ! -f "$base" ]; then
    echo "== base: Debian bookworm, whose Python is 3.11"
    mirror=$(apt-get indextargets --format '$(SITE)' 'Created-By: Packages' | head -1)
    debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates bookworm "$folder/root" "$mirror" \
      > "$folder/debootstrap.log" || fail "debootstrap failed; see $folder/debootstrap.log"
    tar -C "$folder/root" -cf "$base.part" . && mv "$base.part" "$base" && rm -rf "$folder/root"
  fi
fi
if [ -f "$base" ]; then
  mkdir -p "$folder/context"
  ln -f "$base" "$folder/context/base.tar" 2> /dev/null || cp "$base" "$folder/context/base.tar"
  # `--layers` finds it again, and with it the layers above.
  printf 'FROM scratch\nADD base.tar /\n' > "$folder/context/Dockerfile"
  buildah bud -q --layers -t localhost/cce-base -f "$folder/context/Dockerfile" "$folder/context" > /dev/null
  rm -r "$folder/context"
  base=localhost/cce-base
fi

# ---- where this machine's apt and pip get packages, which the image must not keep: mounted while it is built
if [ -n "$own" ]; then  # another base has its own releases
  for file in /etc/apt/sources.list /etc/apt/sources.list.d /etc/apt/apt.conf.d; do
    [ ! -e "$file" ] || mounts+=(-v "$file:$file:ro")
  done
fi
python3 -m pip config list | python3 -c '
import re, sys

# Options of the environment come first there, as `:env:.name`, and win.
kept = "index-url extra-index-url find-links cert trusted-host proxy default-timeout timeout".split()
found = {}
for line in sys.stdin:
    name, _, value = line.strip().partition("=")
    found.setdefault(name.rpartition(".")[2], value.strip(chr(39)))
print("[global]", *(f"{name} = {found[name]}" for name in kept if name in found), sep="\n")
' > "$folder/pip.conf"
mounts+=(-v "$folder/pip.conf:/etc/pip.conf:ro")
for path in $(sed -nE 's/^(index-url|extra-index-url|find-links|cert) = //p' "$folder/pip.conf"); do
  path=${path#file://}
  path=${path%/simple}  # an index of pip's form has its files beside that folder
  [ ! -e "$path" ] || mounts+=(-v "$path:$path:ro")
done

# ---- the image
version=$(sed -nE 's/^(__version__|version) *= *"([^"]+)".*/\2/p' cce_torchrec/__init__.py pyproject.toml | head -1)
revision=$(git rev-parse HEAD 2> /dev/null || echo unknown)
image=localhost/cce-torchrec:$target
echo "== $image: version $version, revision $revision, storage by $driver"
began=$SECONDS
# `--format docker`, as the other format has no health check.
buildah bud --format docker --layers --pull-never --build-arg "BASE=$base" --build-arg "VERSION=$version" \
  --build-arg "REVISION=$revision" "${mounts[@]}" --target "$target" -t "$image" -f docker/Dockerfile . \
  > "$folder/build.log" 2>&1 || { tail -40 "$folder/build.log" >&2; fail "the build failed; see $folder/build.log"; }
size=$(buildah images --format '{{.Size}}' "$image" | head -1)
echo "built in $((SECONDS - began)) s; $size"

# ---- what it does
# A host name that is known: torchrun looks up its own, and buildah leaves it out of /etc/hosts.
container=$(buildah from --pull-never --add-host cce:127.0.0.1 "$image")
run() { buildah run --user 10001:10001 --hostname cce "$container" -- "$@"; }
config() { buildah inspect --type image --format "{{$1}}" "$image"; }
if [ $# -gt 0 ]; then
  run "$@"
  exit
fi
echo "== user $(config .Docker.Config.User), which is $(run id -u -n)"
[ "$(run id -u)" != 0 ] || fail "the image runs as root"
echo "== labels: $(config .Docker.Config.Labels)"
echo "== entry point: $(config .Docker.Config.Entrypoint); command: $(config .Docker.Config.Cmd)"
health=$(run python /usr/local/bin/cce-healthcheck) || fail "the health check fails"
echo "== health check: $(config .Docker.Config.Healthcheck.Test): $health"
if [ "$target" = test ]; then
  run python -m pytest -q -p no:cacheprovider tests/unit/test_config.py tests/unit/test_backward.py tests/distributed/test_finalize.py
else
  echo "== two ranks by torchrun"
  run torchrun --standalone --nproc-per-node 2 -m cce_torchrec.train --dataset flights --epochs 1 --out /runs/flights
fi
