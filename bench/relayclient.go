package bench

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"github.com/pion/stun/v4"

	"sallyway/relay/udpio"
)

// relayChannel is the number of every client's one channel.
const relayChannel = 0x4000

// relayAsk is how long a relay has to answer.
const relayAsk = 2 * time.Second

// relayClient is a bare TURN client over UDP (RFC 8656): one allocation, one channel. It says nothing of its own accord, and
// so serves measurements that end before its permission does, in five minutes.
type relayClient struct {
	udp                   *net.UDPConn
	sock                  *udpio.Conn
	user, realm, password string
	nonce                 stun.Nonce
	relayed               netip.AddrPort
	small                 bool
}

// newRelayClient allocates from a connected socket, which it takes over. Small leaves the socket's buffers as they are.
func newRelayClient(udp *net.UDPConn, small bool, user, realm, password string) (*relayClient, error) {
	var cfg udpio.Config
	if small {
		cfg.ReadBuffer, cfg.WriteBuffer = -1, -1
	}
	sock, _, err := udpio.New(udp, cfg)
	if err != nil {
		return nil, errors.Join(err, udp.Close())
	}
	c := &relayClient{udp: udp, sock: sock, user: user, realm: realm, password: password, small: small}
	const udpTransport = 17 // RFC 8656 §18.8
	m, err := c.ask(stun.MethodAllocate, attribute{stun.AttrRequestedTransport, []byte{udpTransport, 0, 0, 0}})
	if err == nil {
		var a stun.XORMappedAddress
		if err = a.GetFromAs(m, stun.AttrXORRelayedAddress); err == nil {
			ip, _ := netip.AddrFromSlice(a.IP)
			c.relayed = netip.AddrPortFrom(ip.Unmap(), uint16(a.Port))
		}
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("allocate: %w", err), udp.Close())
	}
	return c, nil
}

// bind binds the channel to a peer, which permits it too.
func (c *relayClient) bind(peer netip.AddrPort) error {
	_, err := c.ask(stun.MethodChannelBind, attribute{stun.AttrChannelNumber, []byte{relayChannel >> 8, relayChannel & 0xff, 0, 0}}, peerAddress(peer))
	if err != nil {
		return fmt.Errorf("bind a channel: %w", err)
	}
	return nil
}

// ask sends a request, again after a challenge, and returns the success response.
func (c *relayClient) ask(method stun.Method, attrs ...stun.Setter) (*stun.Message, error) {
	for range 3 {
		all := append([]stun.Setter{stun.NewType(method, stun.ClassRequest), stun.TransactionID}, attrs...)
		if len(c.nonce) > 0 {
			all = append(all, stun.NewUsername(c.user), stun.NewRealm(c.realm), c.nonce, stun.NewLongTermIntegrity(c.user, c.realm, c.password))
		}
		req, err := stun.Build(all...)
		if err != nil {
			return nil, err
		}
		m, err := c.exchange(req)
		if err != nil || m.Type.Class == stun.ClassSuccessResponse {
			return m, err
		}
		var code stun.ErrorCodeAttribute
		if err := code.GetFrom(m); err != nil {
			return nil, err
		}
		if code.Code != stun.CodeUnauthorized && code.Code != stun.CodeStaleNonce {
			return nil, fmt.Errorf("refused: %v", code)
		}
		if err := c.nonce.GetFrom(m); err != nil {
			return nil, err
		}
	}
	return nil, errors.New("not authorized")
}

func (c *relayClient) exchange(req *stun.Message) (*stun.Message, error) {
	if err := c.udp.SetDeadline(time.Now().Add(relayAsk)); err != nil {
		return nil, err
	}
	if _, err := c.udp.Write(req.Raw); err != nil {
		return nil, err
	}
	buf := make([]byte, udpio.MaxRead)
	for {
		n, err := c.udp.Read(buf)
		if err != nil {
			return nil, err
		}
		m := &stun.Message{Raw: buf[:n]}
		if buf[0] < 4 && m.Decode() == nil && m.TransactionID == req.TransactionID {
			return m, c.udp.SetDeadline(time.Time{})
		}
	}
}

// attribute is a STUN attribute as it is on the wire.
type attribute struct {
	kind  stun.AttrType
	value []byte
}

// AddTo implements stun.Setter.
func (a attribute) AddTo(m *stun.Message) error {
	m.Add(a.kind, a.value)
	return nil
}

// peerAddress is XOR-PEER-ADDRESS (RFC 8656 §18.3).
type peerAddress netip.AddrPort

// AddTo implements stun.Setter.
func (p peerAddress) AddTo(m *stun.Message) error {
	a := netip.AddrPort(p)
	return stun.XORMappedAddress{IP: a.Addr().AsSlice(), Port: int(a.Port())}.AddToAs(m, stun.AttrXORPeerAddress)
}
