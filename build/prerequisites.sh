#!/bin/bash
# Installs the Debian packages that the tests use, as root. Services that come with them are neither started now nor at
# the next boot; services of packages that were here before are left alone.
#
#   prerequisites.sh          what `make test` uses
#   prerequisites.sh demo     only what `make demo` and `make bench-quick` use
#   prerequisites.sh image    only what `make image` uses
#   prerequisites.sh bench    what `make bench` uses: the other products that it measures
set -euo pipefail

packages=(iperf3 iproute2 iputils-ping nftables curl procps ca-certificates)
tools=(iperf3 ip ping nft curl)
image=(ca-certificates kmod xz-utils dosfstools mtools syslinux qemu-utils)
image_tools=(depmod xz mkfs.vfat mcopy syslinux qemu-img)
case "${1:-}" in
demo) ;;
image)
	packages=("${image[@]}")
	tools=("${image_tools[@]}")
	;;
bench)
	packages+=(openssh-server openssh-client wireguard-tools nebula openvpn coturn)
	tools+=(ssh sshd wg nebula openvpn turnserver)
	;;
'')
	packages+=(
		dnsutils openssl systemd                                          # tools
		postgresql postgresql-client openssh-server openssh-client coturn # real servers and clients
		redis-server
		glewlwyd # an OpenID Connect provider
		podman runc                                                        # containers
		tinyproxy-bin microsocks                                           # egress proxies
		dnsmasq-base                                                       # a DHCP server and router for the appliance
		gcc libc6-dev                                                      # the race detector
		chromium                                                           # the web UI's tests
		prometheus                                                         # promtool, for alert rules
		mmdebstrap rpm                                                     # Debians to install the packages on
		"${image[@]}" qemu-system-x86 ovmf                                 # the appliance
	)
	tools+=(podman runc dig psql redis-server glewlwyd ssh sshd turnutils_uclient openssl tinyproxy microsocks dnsmasq gcc chromium promtool mmdebstrap rpm "${image_tools[@]}" qemu-system-x86_64)
	;;
*)
	echo "usage: $0 [demo|image|bench]" >&2
	exit 2
	;;
esac

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
	echo "Installing packages: ${missing[*]}"
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
if [ "${1:-}" = bench ]; then
	# One by one: a package that this release lacks keeps no other out.
	failed=()
	for p in "${missing[@]}"; do
		apt-get -q -y install --no-install-recommends "$p" || failed+=("$p")
	done
else
	apt-get -q -y install --no-install-recommends "${missing[@]}"
fi

for p in "${missing[@]}"; do
	case $p in
	postgresql) unit=postgresql ;;
	redis-server) unit=redis-server ;;
	openssh-server) unit=ssh ;;
	coturn) unit=coturn ;;
	openvpn) unit=openvpn ;;
	nftables) unit=nftables ;;
	iperf3) unit=iperf3 ;;
	*) continue ;;
	esac
	if [ -d /run/systemd/system ]; then
		systemctl disable --now --quiet "$unit" 2>/dev/null || true # the package may have no such unit
	fi
done

if [ -n "${failed[*]-}" ]; then
	echo "Not installed: ${failed[*]}" >&2
	exit 1
fi
