package command

import (
	"context"
	"net/http"
	"net/url"
	"time"

	"github.com/spf13/cobra"
)

// completionTimeout is how long the shell may wait for a key.
const completionTimeout = time.Second

// shown is what the running instance answers, nothing if it doesn't.
func shown[T any](cmd *cobra.Command, path string, query url.Values) []T {
	in, err := instanceOf(cmd)
	if err != nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), completionTimeout)
	defer cancel()
	_, list, _ := askFor[T](ctx, in, http.MethodGet, path, query, nil)
	return list
}

// completeBackends completes the first argument.
func completeBackends(cmd *cobra.Command, args []string, _ string) ([]cobra.Completion, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	query := make(url.Values)
	if lb := text(cmd, "lb"); lb != "" {
		query.Set("lb", lb)
	}
	seen := make(map[string]bool)
	var addresses []cobra.Completion
	for _, b := range shown[backend](cmd, "/tcp_lb/backends", query) {
		if !seen[b.Address] {
			seen[b.Address] = true
			addresses = append(addresses, b.Address)
		}
	}
	return addresses, cobra.ShellCompDirectiveNoFileComp
}

// completeWeight completes a backend, and what may stand for its weight.
func completeWeight(cmd *cobra.Command, args []string, toComplete string) ([]cobra.Completion, cobra.ShellCompDirective) {
	if len(args) == 1 {
		return []cobra.Completion{"config"}, cobra.ShellCompDirectiveNoFileComp
	}
	return completeBackends(cmd, args, toComplete)
}

func addPoolFlag(cmd *cobra.Command) {
	cmd.Flags().StringP("lb", "", "", "Only in the pool of this name")
	completeFlag(cmd, "lb", completePools)
}

func completePools(cmd *cobra.Command, _ []string, _ string) ([]cobra.Completion, cobra.ShellCompDirective) {
	var names []cobra.Completion
	for _, p := range shown[pool](cmd, "/tcp_lb/pools", nil) {
		names = append(names, p.LB)
	}
	return names, cobra.ShellCompDirectiveNoFileComp
}

func completeFlag(cmd *cobra.Command, flag string, f cobra.CompletionFunc) {
	if err := cmd.RegisterFlagCompletionFunc(flag, f); err != nil {
		panic(err) // there is no such flag
	}
}
