// Sdkclient asks the instance metadata service for credentials as a program that uses aws-sdk-go-v2 does.
//
// It prints "credentials ACCESSKEYID expires TIME", never a secret, or with --path the value of that path, and exits
// with 0; or the error in one line on standard error, and exits with 1.
package main

import (
	"bufio"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/config"
	"github.com/aws/aws-sdk-go-v2/credentials/ec2rolecreds"
	"github.com/aws/aws-sdk-go-v2/feature/ec2/imds"
)

func main() {
	if err := run(os.Args[1:], os.Stdin, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "sdkclient:", strings.Join(strings.Fields(err.Error()), " "))
		os.Exit(1)
	}
}

func run(args []string, stdin io.Reader, stdout io.Writer) error {
	flags := flag.NewFlagSet("sdkclient", flag.ExitOnError)
	mode := flags.String("endpoint-mode", "ipv4", "ask 169.254.169.254 (ipv4) or fd00:ec2::254 (ipv6)")
	path := flags.String("path", "", "get this path below meta-data/ instead of credentials")
	chain := flags.Bool("default-chain", false, "ask where the environment says, as a program in a task of ECS or a pod of EKS")
	repeat := flags.Int("repeat", 1, "ask this many times, the last failure being the result")
	wait := flags.Bool("wait-stdin", false, "wait for a line on standard input before each time")
	flags.Parse(args)

	var options imds.Options
	if err := options.EndpointMode.SetFromString(*mode); err != nil {
		return err
	}
	client := imds.New(options)
	retrieve := ec2rolecreds.New(func(o *ec2rolecreds.Options) { o.Client = client }).Retrieve
	if *chain {
		c, err := config.LoadDefaultConfig(context.Background())
		if err != nil {
			return err
		}
		retrieve = c.Credentials.Retrieve
	}
	ask := func(ctx context.Context) (string, error) {
		c, err := retrieve(ctx)
		return fmt.Sprintf("credentials %s expires %s", c.AccessKeyID, c.Expires.UTC().Format(time.RFC3339)), err
	}
	if *path != "" {
		ask = func(ctx context.Context) (string, error) {
			out, err := client.GetMetadata(ctx, &imds.GetMetadataInput{Path: *path})
			if err != nil {
				return "", err
			}
			value, err := io.ReadAll(out.Content)
			return string(value), errors.Join(err, out.Content.Close())
		}
	}

	lines := bufio.NewReader(stdin)
	var last error
	for range *repeat {
		if *wait {
			if _, err := lines.ReadString('\n'); err != nil {
				return fmt.Errorf("wait for a line: %w", err)
			}
		}
		answer, err := ask(context.Background())
		if err == nil {
			fmt.Fprintln(stdout, answer)
		}
		last = err
	}
	return last
}
