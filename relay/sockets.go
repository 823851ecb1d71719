package relay

import (
	"bufio"
	"os"
	"strconv"
	"strings"

	"github.com/prometheus/client_golang/prometheus"
)

// sockets shows the queues of the relay's sockets to Prometheus, and what the whole system dropped of UDP.
type sockets struct{ s *Server }

var _ prometheus.Collector = sockets{}

var (
	socketDrops = prometheus.NewDesc("sallyway_relay_receive_buffer_errors_total",
		"Datagrams dropped by the kernel: receive buffer full. Those at aside sockets are of sources that send more than their share.", []string{"socket"}, nil)
	socketQueue   = prometheus.NewDesc("sallyway_relay_receive_queue_bytes", "What waits at a socket, as the kernel counts.", []string{"socket"}, nil)
	socketReceive = prometheus.NewDesc("sallyway_relay_receive_buffer_bytes", "Size of a socket's receive buffer, as read back.", []string{"socket"}, nil)
	socketSend    = prometheus.NewDesc("sallyway_relay_send_buffer_bytes", "Size of a socket's send buffer, as read back.", []string{"socket"}, nil)
	systemDrops   = prometheus.NewDesc("sallyway_system_udp_receive_buffer_errors_total",
		"UdpRcvbufErrors of this network namespace, all programs.", []string{"family"}, nil)
)

// Describe names the metrics.
func (sockets) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{socketDrops, socketQueue, socketReceive, socketSend, systemDrops} {
		ch <- d
	}
}

// Collect reads them.
func (c sockets) Collect(ch chan<- prometheus.Metric) {
	counter := func(d *prometheus.Desc, v uint64, label string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(v), label)
	}
	gauge := func(d *prometheus.Desc, v int, label string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, float64(v), label)
	}
	c.s.listening.Lock()
	for _, sh := range c.s.sockets {
		q := sh.sock.Queue()
		read, write := sh.sock.Buffers()
		counter(socketDrops, q.Drops, sh.name)
		gauge(socketQueue, int(q.Used), sh.name)
		gauge(socketReceive, read, sh.name)
		gauge(socketSend, write, sh.name)
	}
	c.s.listening.Unlock()
	counter(socketDrops, c.s.relayedDrops(), "relayed")
	if v, ok := udpCounter("/proc/net/snmp", "RcvbufErrors", ""); ok {
		counter(systemDrops, v, "ipv4")
	}
	if v, ok := udpCounter("/proc/net/snmp6", "", "Udp6RcvbufErrors"); ok {
		counter(systemDrops, v, "ipv6")
	}
}

// udpCounter reads a counter of UDP from one of the kernel's files: by the name of a column of the Udp lines, or by the name of a row.
func udpCounter(file, column, row string) (uint64, bool) {
	f, err := os.Open(file)
	if err != nil {
		return 0, false
	}
	defer f.Close()
	var names []string
	for lines := bufio.NewScanner(f); lines.Scan(); {
		fields := strings.Fields(lines.Text())
		value := ""
		switch {
		case len(fields) < 2:
		case row != "" && fields[0] == row:
			value = fields[1]
		case column != "" && fields[0] == "Udp:" && names == nil:
			names = fields
		case column != "" && fields[0] == "Udp:":
			for i, name := range names {
				if name == column && i < len(fields) {
					value = fields[i]
				}
			}
		}
		if value != "" {
			v, err := strconv.ParseUint(value, 10, 64)
			return v, err == nil
		}
	}
	return 0, false
}

// Warnings are what was wrong with the sockets when they were opened, each with the command that mends it.
func (s *Server) Warnings() []string {
	s.listening.Lock()
	defer s.listening.Unlock()
	return s.warnings
}
