package datagram

import "os"

// NoOffload is the environment variable that turns every offload of this process off: super-datagrams at UDP sockets, and the TUN device's
// super-packets of TCP and UDP with their checksums. It is for comparison, and for drivers that do them wrong. Any value but "" and "0" counts.
const NoOffload = "SALLYWAY_NO_GSO"

// OffloadAllowed is false when NoOffload says so. It is asked when a socket or a device is opened.
func OffloadAllowed() bool {
	v := os.Getenv(NoOffload)
	return v == "" || v == "0"
}
