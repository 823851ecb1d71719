#!/bin/bash
# Builds the four programs of the previous release into a folder, from the commit that build/previous-release names, for
# the tests of upgrades. A folder that has them already stays as it is.
#
#   previous-release.sh FOLDER
#
# Exit code 3: the commit is not in this clone.
set -euo pipefail

out=$(mkdir -p "$1" && cd "$1" && pwd)
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
read -r version commit <"$root/build/previous-release"
# Root may run this in a folder of somebody else.
git=(git -c "safe.directory=$root" -C "$root")
if ! "${git[@]}" cat-file -e "$commit^{commit}" 2>/dev/null; then
	echo "previous-release: commit $commit of $version is not in this clone: git fetch --unshallow" >&2
	exit 3
fi
if [ "$(cat "$out/built" 2>/dev/null)" = "$version $commit" ]; then
	exit 0
fi
go=$("$root/build/find-go.sh")
src=$(mktemp -d)
trap 'rm -rf "$src"' EXIT
"${git[@]}" archive "$commit" | tar x -C "$src"
cd "$src"
CGO_ENABLED=0 "$go" build -trimpath -buildvcs=false \
	-ldflags "-s -w -X sallyway/internal/version.Version=$version -X sallyway/internal/version.Commit=${commit:0:12}" \
	-o "$out/" ./cmd/gatewayd ./cmd/relayd ./cmd/platformd ./cmd/sallyway
echo "$version $commit" >"$out/built"
