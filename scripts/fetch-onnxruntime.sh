#!/bin/sh
# Puts ONNX Runtime's shared library and its licences into a folder, from the wheel that scripts/onnxruntime.txt pins
# by version and hash. Does nothing when that version is already there; never leaves half a library behind.
#
#   scripts/fetch-onnxruntime.sh target/release      (PYTHON names another Python than python3)
#   scripts/fetch-onnxruntime.sh /opt/tidegate gpu   the CUDA build, from the wheel in scripts/onnxruntime-gpu.txt
set -eu

fail() {
    echo "fetch-onnxruntime: $*" >&2
    exit 1
}

[ $# -ge 1 ] && [ $# -le 2 ] && [ -n "$1" ] ||
    fail "expected the folder to put the library into, and 'gpu' for the CUDA build"
dest=$1
case "${2-cpu}" in
    cpu) package=onnxruntime variant= providers= ;;
    gpu) package=onnxruntime-gpu variant='gpu ' providers='libonnxruntime_providers_shared.so libonnxruntime_providers_cuda.so' ;;
    *) fail "found variant '$2', expected 'gpu' or none" ;;
esac
pins=$(dirname "$0")/$package.txt
version=$(sed -n "s/^$package==\([^ ]*\).*/\1/p" "$pins")
[ -n "$version" ] || fail "no version of $package in $pins"

library=libonnxruntime.so
case "$variant$(uname -s)-$(uname -m)" in
    Linux-x86_64 | 'gpu Linux-x86_64') platform=manylinux_2_28_x86_64 ;;
    Linux-aarch64 | Linux-arm64) platform=manylinux_2_28_aarch64 ;;
    Darwin-arm64) platform=macosx_14_0_arm64 library=libonnxruntime.dylib ;;
    gpu*) fail "no CUDA build for $(uname -s) on $(uname -m): expected Linux on x86_64" ;;
    *) fail "no library for $(uname -s) on $(uname -m): expected Linux on x86_64 or aarch64, or macOS on arm64" ;;
esac

stamp=$dest/onnxruntime.version
if [ -f "$dest/$library" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$version $variant$platform" ]; then
    exit 0
fi

mkdir -p "$dest" || fail "cannot create $dest"
# Inside the destination, so that the last step is a rename within one file system.
work=$(mktemp -d "$dest/.onnxruntime.XXXXXX") || fail "cannot write to $dest"
trap 'rm -rf "$work"' EXIT
trap 'exit 1' HUP INT TERM

python=${PYTHON:-python3}
command -v "$python" >/dev/null 2>&1 || fail "$python is not installed; its pip fetches the wheel of $package $version"
if ! "$python" -m pip --version >/dev/null 2>&1; then
    "$python" -m venv "$work/venv" >/dev/null 2>&1 || fail "$python has neither pip nor venv; install python3-pip"
    python=$work/venv/bin/python
fi

echo "fetching $package $version for $platform" >&2
# The wheel's Python version does not matter, only the library inside: it is named so that any Python can fetch it.
"$python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --require-hashes \
    --python-version 3.12 --implementation cp --platform "$platform" --dest "$work" --requirement "$pins" ||
    fail "pip could not download $package $version (no network, no such version, or a wrong hash; see above)"

# shellcheck disable=SC2086 # providers are words
"$python" - "$work" "$library" $providers <<'PYTHON' || fail "the wheel of $package $version holds no usable library"
import pathlib, re, shutil, sys, zipfile

work, library, providers = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
kept = {"LICENSE": "onnxruntime-LICENSE.txt", "ThirdPartyNotices.txt": "onnxruntime-ThirdPartyNotices.txt"}
(wheel,) = work.glob("*.whl")
with zipfile.ZipFile(wheel) as archive:
    for name in archive.namelist():
        base = name.rsplit("/", 1)[-1]
        if re.fullmatch(r"onnxruntime/capi/libonnxruntime\.(so\.[\d.]+|[\d.]+\.dylib)", name):
            target = library
        elif name.startswith("onnxruntime/capi/") and base in providers:
            target = base
        elif name.count("/") == 1 and base in kept:
            target = kept[base]
        else:
            continue
        with archive.open(name) as source, open(work / target, "wb") as copy:
            shutil.copyfileobj(source, copy)
if missing := [name for name in (library, *providers, *kept.values()) if not (work / name).is_file()]:
    sys.exit(f"missing in {wheel.name}: {', '.join(missing)}")
(work / library).chmod(0o755)
PYTHON

mv -f "$work"/onnxruntime-*.txt "$dest/"
for file in $providers "$library"; do
    mv -f "$work/$file" "$dest/$file"
done
echo "$version $variant$platform" >"$work/stamp"
mv -f "$work/stamp" "$stamp"
echo "$package $version is in $dest" >&2
