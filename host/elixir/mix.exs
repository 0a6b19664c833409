defmodule Bridge.MixProject do
  use Mix.Project

  @version "0.1.0"

  def project do
    [
      app: :bridge_host,
      version: @version,
      elixir: "~> 1.14",
      description:
        "Drives stateless Python kernels from Elixir: the Livebook owns the state, Python computes and forgets.",
      elixirc_paths: elixirc_paths(Mix.env()),
      elixirc_options: [warnings_as_errors: true],
      consolidate_protocols: Mix.env() != :test,
      test_coverage: [summary: [threshold: 0]],
      package: [licenses: ["BSD-3-Clause"]],
      deps: []
    ]
  end

  # No dependency at all. What is there beside Bridge (:telemetry, Kino, Nx, Decimal, Jason, :jiffy) is found at run time
  # or when Bridge is compiled, and used.
  def application do
    # Optional: it is on the code path of who has it, and Mix would hide it.
    [extra_applications: [:logger, :crypto, jiffy: :optional]]
  end

  defp elixirc_paths(:test), do: ["lib", "test/support"]
  defp elixirc_paths(_env), do: ["lib"]
end
