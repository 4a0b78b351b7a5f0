#!/bin/sh
# Puts ONNX Runtime's shared library and its licences into a folder, from the wheel that scripts/onnxruntime.txt pins
# by version and hash. Does nothing when that version is already there; never leaves half a library behind.
#
#   scripts/fetch-onnxruntime.sh target/release      (PYTHON names another Python than python3)
set -eu

fail() {
    echo "fetch-onnxruntime: $*" >&2
    exit 1
}

[ $# -eq 1 ] && [ -n "$1" ] || fail "expected one argument, the folder to put the library into"
dest=$1
pins=$(dirname "$0")/onnxruntime.txt
version=$(sed -n 's/^onnxruntime==\([^ ]*\).*/\1/p' "$pins")
[ -n "$version" ] || fail "no version of onnxruntime in $pins"

library=libonnxruntime.so
case "$(uname -s)-$(uname -m)" in
    Linux-x86_64) platform=manylinux_2_28_x86_64 ;;
    Linux-aarch64 | Linux-arm64) platform=manylinux_2_28_aarch64 ;;
    Darwin-arm64) platform=macosx_14_0_arm64 library=libonnxruntime.dylib ;;
    *) fail "no library for $(uname -s) on $(uname -m): expected Linux on x86_64 or aarch64, or macOS on arm64" ;;
esac

stamp=$dest/onnxruntime.version
if [ -f "$dest/$library" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$version $platform" ]; then
    exit 0
fi

mkdir -p "$dest" || fail "cannot create $dest"
# Inside the destination, so that the last step is a rename within one file system.
work=$(mktemp -d "$dest/.onnxruntime.XXXXXX") || fail "cannot write to $dest"
trap 'rm -rf "$work"' EXIT
trap 'exit 1' HUP INT TERM

python=${PYTHON:-python3}
command -v "$python" >/dev/null 2>&1 || fail "$python is not installed; its pip fetches the wheel of onnxruntime $version"
if ! "$python" -m pip --version >/dev/null 2>&1; then
    "$python" -m venv "$work/venv" >/dev/null 2>&1 || fail "$python has neither pip nor venv; install python3-pip"
    python=$work/venv/bin/python
fi

echo "fetching onnxruntime $version for $platform" >&2
# The wheel's Python version does not matter, only the library inside: it is named so that any Python can fetch it.
"$python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --require-hashes \
    --python-version 3.12 --implementation cp --platform "$platform" --dest "$work" --requirement "$pins" ||
    fail "pip could not download onnxruntime $version (no network, no such version, or a wrong hash; see above)"

"$python" - "$work" "$library" <<'PYTHON' || fail "the wheel of onnxruntime $version holds no usable library"
import pathlib, re, shutil, sys, zipfile

work, library = pathlib.Path(sys.argv[1]), sys.argv[2]
kept = {"LICENSE": "onnxruntime-LICENSE.txt", "ThirdPartyNotices.txt": "onnxruntime-ThirdPartyNotices.txt"}
(wheel,) = work.glob("*.whl")
with zipfile.ZipFile(wheel) as archive:
    for name in archive.namelist():
        base = name.rsplit("/", 1)[-1]
        if re.fullmatch(r"onnxruntime/capi/libonnxruntime\.(so\.[\d.]+|[\d.]+\.dylib)", name):
            target = library
        elif name.count("/") == 1 and base in kept:
            target = kept[base]
        else:
            continue
        with archive.open(name) as source, open(work / target, "wb") as copy:
            shutil.copyfileobj(source, copy)
if missing := [name for name in (library, *kept.values()) if not (work / name).is_file()]:
    sys.exit(f"missing in {wheel.name}: {', '.join(missing)}")
(work / library).chmod(0o755)
PYTHON

mv -f "$work"/onnxruntime-*.txt "$dest/"
mv -f "$work/$library" "$dest/$library"
echo "$version $platform" >"$work/stamp"
mv -f "$work/stamp" "$stamp"
echo "onnxruntime $version is in $dest" >&2
