GO ?= go
COMPOSE ?= $(shell command -v docker-compose || echo docker compose)
STATICCHECK_VERSION ?= v0.8.2
SOAK ?= 10m
SEED ?= 0

.DEFAULT_GOAL := help
.PHONY: help build run test test-verbose test-coverage soak lint bench bench-parts docker-build docker-up docker-down clean

help: ## Show the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

build: ## Build bin/caddy, with this module in it
	CGO_ENABLED=0 $(GO) build -trimpath -o bin/caddy ./cmd/caddy

run: ## Run the quick start: localhost:8080 over three demo backends
	$(GO) run ./cmd/caddy run --config examples/quickstart/Caddyfile

test: ## Run all tests with the race detector
	$(GO) test -race -count=1 ./...

test-verbose: ## The same, naming every test
	$(GO) test -race -count=1 -v ./...

test-coverage: ## The same, with coverage.html
	$(GO) test -race -count=1 -coverprofile=coverage.out ./...
	$(GO) tool cover -func=coverage.out | tail -n 1
	$(GO) tool cover -html=coverage.out -o coverage.html

soak: ## Run the soak test for SOAK=10m, with SEED=<number> to repeat one
	$(GO) test -race -count=1 -timeout 0 -v -run '^TestSoak$$' . -soak $(SOAK) -soak.seed $(SEED)

lint: ## Check formatting, vet and staticcheck
	@test -z "$$(gofmt -l .)" || { echo "not formatted:"; gofmt -l .; exit 1; }
	$(GO) vet ./...
	$(GO) run honnef.co/go/tools/cmd/staticcheck@$(STATICCHECK_VERSION) ./...

bench: ## Compare with caddy-l4's proxy, and with HAProxy and nginx if installed
	$(GO) run ./bench

bench-parts: ## Run the Go benchmarks
	$(GO) test -run '^$$' -bench . -benchmem ./...

docker-build: ## Build the image
	docker build -t caddy-tcp-lb:local .

docker-up: ## Start the container stack
	$(COMPOSE) up --build

docker-down: ## Stop the container stack
	$(COMPOSE) down

clean: ## Remove what was built
	rm -rf bin coverage.out coverage.html
