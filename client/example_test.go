package client_test

import (
	"context"
	"fmt"
	"io"
	"log"
	"os"
	"time"

	"sallyway/client"
)

// A program that reaches a private HTTP server through its organization's gateways, without a TUN device or root.
func ExampleDial() {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	// The token is needed the first time only: the key and certificate that it bought stay in StateDir.
	c, err := client.Dial(ctx, client.Config{StateDir: "/var/lib/my-app", Token: os.Getenv("SALLYWAY_TOKEN")})
	if err != nil {
		log.Fatal(err)
	}
	defer c.Close()
	conn, err := c.DialContext(ctx, "tcp", "intranet:80") // a resource's name
	if err != nil {
		log.Fatal(err) // names the rule that said no
	}
	defer conn.Close()
	fmt.Fprintf(conn, "GET / HTTP/1.0\r\nHost: intranet\r\n\r\n")
	if _, err := io.Copy(os.Stdout, conn); err != nil {
		log.Print(err)
	}
}
