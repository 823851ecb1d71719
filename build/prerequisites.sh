#!/bin/bash
# Installs the Debian packages that the tests use, as root. Services that come with them are neither started now nor at
# the next boot; services of packages that were here before are left alone.
set -euo pipefail

# With the word demo: only what `make demo` uses.
packages=(iperf3 iproute2 iputils-ping nftables curl procps ca-certificates)
tools=(iperf3 ip ping nft curl)
if [ "${1:-}" != demo ]; then
	packages+=(
		dnsutils openssl systemd                                          # tools
		postgresql postgresql-client openssh-server openssh-client coturn # real servers and clients
		gcc libc6-dev                                                      # the race detector
	)
	tools+=(dig psql ssh sshd turnutils_uclient openssl gcc)
fi

if ! command -v dpkg-query >/dev/null || ! command -v apt-get >/dev/null; then
	missing=()
	for tool in "${tools[@]}"; do
		PATH=$PATH:/usr/sbin:/sbin command -v "$tool" >/dev/null || missing+=("$tool")
	done
	if [ ${#missing[@]} -gt 0 ]; then
		echo "This is no Debian: please install what provides these commands: ${missing[*]}" >&2
		exit 1
	fi
	exit 0
fi

missing=()
for p in "${packages[@]}"; do
	# A virtual name (dnsutils on newer releases) counts as installed when something provides it.
	dpkg-query -W -f='${Status}' "$p" 2>/dev/null | grep -q '^install ok installed$' && continue
	[ "$p" = dnsutils ] && command -v dig >/dev/null && continue
	missing+=("$p")
done
[ ${#missing[@]} -eq 0 ] && exit 0

if [ "$(id -u)" != 0 ]; then
	echo "Installing packages for the tests: ${missing[*]}"
	exec "$(dirname "$0")/as-root.sh" "$0" "$@"
fi

# policy-rc.d is how Debian asks whether a package may start its service (invoke-rc.d(8)); 101 says no.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
	trap 'rm -f "$policy"' EXIT
	printf '#!/bin/sh\nexit 101\n' >"$policy"
	chmod 755 "$policy"
fi

export DEBIAN_FRONTEND=noninteractive
apt-get -q update
apt-get -q -y install --no-install-recommends "${missing[@]}"

for p in "${missing[@]}"; do
	case $p in
	postgresql) unit=postgresql ;;
	openssh-server) unit=ssh ;;
	coturn) unit=coturn ;;
	nftables) unit=nftables ;;
	iperf3) unit=iperf3 ;;
	*) continue ;;
	esac
	if [ -d /run/systemd/system ]; then
		systemctl disable --now --quiet "$unit" 2>/dev/null || true # the package may have no such unit
	fi
done
