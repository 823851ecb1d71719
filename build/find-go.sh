#!/bin/bash
# Prints the path of a usable go command: from PATH, the usual install folders, or, under sudo, the calling user's PATH.
# "Usable" is 1.21 or newer: such a go fetches the release that go.mod asks for by itself.
set -u

usable() {
	local version
	[ -n "$1" ] && [ -x "$1" ] || return 1
	version=$(cd / && GOTOOLCHAIN=local "$1" env GOVERSION 2>/dev/null) || return 1
	[[ $version =~ ^go1\.([0-9]+) ]] && [ "${BASH_REMATCH[1]}" -ge 21 ]
}

try() {
	if usable "$1"; then
		printf '%s\n' "$1"
		exit 0
	fi
}

try "${GO:-}"
try "$(command -v go 2>/dev/null)"
for go in /usr/local/go/bin/go /usr/lib/go/bin/go /snap/bin/go; do
	try "$go"
done
if [ "$(id -u)" = 0 ] && [ -n "${SUDO_USER:-}" ] && [ "$SUDO_USER" != root ]; then
	home=$(getent passwd "$SUDO_USER" | cut -d: -f6)
	try "$home/go/bin/go"
	try "$home/sdk/go/bin/go"
	# A login shell reads .profile, an interactive one .bashrc; either may set PATH. Their own output is cut off.
	for flags in -lc -ic; do
		try "$(sudo -Hu "$SUDO_USER" bash $flags 'echo "GO=$(command -v go)"' 2>/dev/null </dev/null | sed -n 's/^GO=//p' | tail -1)"
	done
fi
echo "go 1.21 or newer is not found in PATH, /usr/local/go/bin or the calling user's PATH." >&2
echo "Install it from https://go.dev/dl/ (the release that go.mod names is best), or run: make GO=/path/to/go" >&2
exit 1
