package update

import (
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"unicode/utf16"
)

// Boot says how the machine was started.
type Boot struct {
	// UEFI is false for a BIOS boot.
	UEFI bool
	// Version is that of the image that runs; "" where nothing says it.
	Version Version
	// File is the name of the image's file, or of its entry, as LoaderBootCountPath or LoaderEntrySelected say it, without its folder. "" where
	// they do not.
	File string
	// Partition is the unique identifier of the GPT partition that it was started from, in lower case; "" where nothing says it.
	Partition string
}

// Where FindBoot looks.
const (
	EFIVars = "/sys/firmware/efi/efivars"
	CmdLine = "/proc/cmdline"
)

// Parameter is that of the kernel's command line that names the version of the image, in a BIOS's menu and in a unified kernel image.
const Parameter = "sallyway.image="

// loader is the vendor of systemd-boot's variables.
const loader = "-4a67b082-0a4c-41cf-b6c7-440b29bb8c4f"

// FindBoot finds out how the machine was started, from the folder of the EFI variables and the kernel's command line. What is missing
// there stays empty.
func FindBoot(efivars, cmdline string) Boot {
	var b Boot
	// The folder around it is the kernel's own; the variables may be missing, without a module or by a setting.
	if st, err := os.Stat(filepath.Dir(efivars)); err == nil && st.IsDir() {
		b.UEFI = true
	}
	if b.UEFI {
		b.Partition = strings.ToLower(variable(efivars, "LoaderDevicePartUUID"))
		// LoaderBootCountPath is the name after this boot was counted; LoaderEntrySelected may be the one before.
		for _, name := range []string{"LoaderBootCountPath", "LoaderEntrySelected", "StubImageIdentifier"} {
			path := variable(efivars, name)
			file := path[strings.LastIndexAny(path, `\/`)+1:]
			if e, _, ok := parseEntry(file); ok {
				b.Version, b.File = e.Version, file
				break
			}
		}
	}
	if b.Version == "" {
		if text, err := os.ReadFile(cmdline); err == nil {
			b.Version = fromCmdline(string(text))
		}
	}
	return b
}

func fromCmdline(text string) Version {
	for _, word := range strings.Fields(text) {
		if s, ok := strings.CutPrefix(word, Parameter); ok {
			if v, err := ParseVersion(s); err == nil {
				return v
			}
		}
	}
	return ""
}

// variable reads a variable of systemd-boot's; "" where there is none.
func variable(efivars, name string) string {
	b, err := os.ReadFile(filepath.Join(efivars, name+loader))
	if err != nil {
		return ""
	}
	s, err := parseVariable(b)
	if err != nil {
		return ""
	}
	return s
}

// parseVariable reads what efivarfs shows: four bytes of attributes, then UTF-16 with a zero at its end.
func parseVariable(b []byte) (string, error) {
	if len(b) < 4 || len(b) > 4096 || len(b)%2 != 0 {
		return "", errors.New("not a variable with text")
	}
	var u []uint16
	for b = b[4:]; len(b) > 0; b = b[2:] {
		c := binary.LittleEndian.Uint16(b)
		if c == 0 {
			break
		}
		u = append(u, c)
	}
	return string(utf16.Decode(u)), nil
}
