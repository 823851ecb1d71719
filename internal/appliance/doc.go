// Package appliance is the operating system of Sallyway's appliance: what process 1 does in an image that holds a kernel, this one
// program, and nothing else that runs by itself.
//
// # What lies in the image
//
//	/init                        this program (cmd/appliance)
//	/modules/NNN-name.ko         kernel modules that are always loaded, in the order of their file names
//	/modules/hw/NNN-name.ko      modules that are loaded, in this order, only when a device of this machine asks for them
//	/modules/hw/aliases          lines of modules.alias for those ("alias PATTERN name"); a module's dependencies that lie in hw, too,
//	                             come as lines "depends name other…", where names are those of the files without NNN- and .ko
//	/sbin/mke2fs, /sbin/e2fsck   with the libraries that they need at the places that the linker looks for, see state.Tools
//	/etc/ssl/certs/ca-certificates.crt
//	/etc/mke2fs.conf             optional
//	/dev/console                 a device node: without it the kernel gives process 1 no standard output
//
// Everything else is made at start: /proc, /sys, /dev, /run, /tmp, /state, /etc/resolv.conf (by internal/appliance/network, in /run).
// Host names are resolved by Go's own resolver.
//
// # Command line
//
//	console=tty0 console=ttyS0 quiet panic=5 oops=panic
//
// Process 1 writes to every console that the kernel names (/sys/class/tty/console/active).
//
// # The disk
//
// A GPT partition with the type state.PartitionType (or the name sallyway-state) is the state partition; an empty one gets a file
// system at first boot. On a disk of ours (one that has a partition named sallyway-esp) without it, the free space after the last partition
// becomes one. So an image may be shipped with the ESP alone, and grows when the disk that it is written to is larger.
//
// # Lines for machines
//
// One line "SALLYWAY-READY {json}" when every daemon of the role is healthy, for the first time since the start; one line
// "SALLYWAY-UNCONFIGURED {json}" when no source has a configuration. Their documents are console.Ready and console.Unconfigured.
package appliance
