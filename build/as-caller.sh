#!/bin/bash
# Runs a command as the user who owns the tree: under "sudo make" that is the user who called sudo, so that no file of
# root's is left among theirs. Anybody else runs it as they are.
set -eu
tree=$(cd "$(dirname "$0")/.." && pwd)
owner=$(stat -c %U "$tree")
if [ "$(id -u)" = 0 ] && [ "${SUDO_USER:-root}" != root ] && [ "$owner" = "$SUDO_USER" ]; then
	exec sudo -Hu "$SUDO_USER" -- env "PATH=$PATH" ${GOPROXY:+"GOPROXY=$GOPROXY"} ${GOFLAGS:+"GOFLAGS=$GOFLAGS"} \
		${GOTOOLCHAIN:+"GOTOOLCHAIN=$GOTOOLCHAIN"} ${CGO_ENABLED:+"CGO_ENABLED=$CGO_ENABLED"} "$@"
fi
exec "$@"
