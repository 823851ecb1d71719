#!/bin/bash
# Runs a command as root: as it is where the caller is root, through sudo where not. What the tests read from the
# environment goes along. "go test -exec" uses it too, so tests are compiled as the caller and run as root.
set -eu
if [ "$(id -u)" = 0 ]; then
	exec "$@"
fi
if ! command -v sudo >/dev/null; then
	echo "This needs root (network namespaces, TUN devices), and there is no sudo here. Run make as root." >&2
	exit 1
fi
keep=("PATH=$PATH")
for name in CI TMPDIR TERM GORACE GOTRACEBACK GOMAXPROCS GOCOVERDIR; do
	if [ -n "${!name-}" ]; then keep+=("$name=${!name}"); fi
done
while IFS='=' read -r name _; do
	case $name in SALLYWAY_*) keep+=("$name=${!name}") ;; esac
done < <(env)
exec sudo -- env "${keep[@]}" "$@"
