// Sdkv1client asks the instance metadata service for credentials as a program that uses aws-sdk-go does, the first
// version of AWS's SDK, which is at its end and still inside many programs.
//
// It prints "credentials ACCESSKEYID" and exits with 0; or the error in one line on standard error, and exits with 1.
package main

import (
	"fmt"
	"os"
	"strings"

	"github.com/aws/aws-sdk-go/aws/credentials/ec2rolecreds"
	"github.com/aws/aws-sdk-go/aws/session"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "sdkv1client:", strings.Join(strings.Fields(err.Error()), " "))
		os.Exit(1)
	}
}

func run() error {
	s, err := session.NewSession()
	if err != nil {
		return err
	}
	c, err := ec2rolecreds.NewCredentials(s).Get()
	if err != nil {
		return err
	}
	fmt.Println("credentials", c.AccessKeyID)
	return nil
}
