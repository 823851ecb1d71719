package main

import (
	"crypto/ed25519"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"sallyway/internal/appliance/update"
)

// signature is what is put behind the name of an image to name its signed manifest.
const signature = ".sig"

func keyCommand() *cobra.Command {
	return &cobra.Command{
		Use: "key FILE", Short: "Make a key for signing images, and print its public half", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			private, public, err := update.NewKey()
			if err != nil {
				return err
			}
			f, err := os.OpenFile(args[0], os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
			if err != nil {
				return err
			}
			_, err = fmt.Fprintln(f, private)
			if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
				return err
			}
			_, err = fmt.Fprintln(cmd.OutOrStdout(), public)
			return err
		},
	}
}

func signCommand() *cobra.Command {
	var files []string
	cmd := &cobra.Command{
		Use: "sign --key FILE IMAGE.efi", Short: "Write the signed manifest of an image beside it", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(files) == 0 {
				return errors.New("--key is missing: name the file that `mkimage key FILE` made")
			}
			var keys []ed25519.PrivateKey
			for _, name := range files {
				k, err := update.ReadKey(name)
				if err != nil {
					return err
				}
				keys = append(keys, k)
			}
			return sign(args[0], keys)
		},
	}
	cmd.Flags().StringArrayVar(&files, "key", nil, "file with a private key; with several, any one of them is enough for an appliance")
	return cmd
}

// sign writes the manifest of an image whose name says its version and architecture.
func sign(image string, keys []ed25519.PrivateKey) error {
	name, ok := strings.CutSuffix(filepath.Base(image), ".efi")
	parts := strings.Split(name, "_")
	if !ok || len(parts) != 3 || parts[0] != "sallyway" {
		return fmt.Errorf("%s: the name of an image is sallyway_VERSION_ARCH.efi", image)
	}
	v, err := update.ParseVersion(parts[1])
	if err != nil {
		return err
	}
	m, err := update.Describe(image, v, parts[2])
	if err != nil {
		return err
	}
	text, err := update.Sign(m, keys...)
	if err != nil {
		return err
	}
	return os.WriteFile(image+signature, text, 0o644)
}
