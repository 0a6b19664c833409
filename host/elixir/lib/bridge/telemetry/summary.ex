defmodule Bridge.Telemetry.Summary do
  @moduledoc """
  All figures of a bridge, as `Bridge.Telemetry.summary/1` gives them: shows itself as tables.

  `events` is how many there were, `unknown` how many of kernels' events the catalogue does not have, `refused` how many no
  kernel can have measured.
  """

  alias Bridge.Display.Table

  import Bridge.Live.Words

  defstruct events: 0, unknown: 0, refused: 0, recent: nil, latencies: [], errors: [], kernels: [], models: []

  @type t :: %__MODULE__{
          events: non_neg_integer(),
          unknown: non_neg_integer(),
          refused: non_neg_integer(),
          recent: map() | nil,
          latencies: [map()],
          errors: [map()],
          kernels: [map()],
          models: [map()]
        }

  @doc "The tables that have rows: title, columns, rows of texts."
  @spec tables(t()) :: [{String.t(), [String.t()], [[String.t()]]}]
  def tables(summary) do
    Enum.reject(
      [
        {"commands", ["command", "count", "errors", "p50", "p95", "p99", "queue p95", "kernel p50", "retries"],
         Enum.map(summary.latencies, &latency/1)},
        {"errors", ["error", "of", "count", "most of"], Enum.map(summary.errors, &error/1)},
        {"kernels", ["kernel", "process", "state", "commands", "errors", "memory", "lost", "reason"],
         Enum.map(summary.kernels, &kernel/1)},
        {"models", ["model", "calls", "errors", "cached", "tokens", "cost", "p50", "p95"],
         Enum.map(summary.models, &model/1)}
      ],
      fn {_title, _columns, rows} -> rows == [] end
    )
  end

  @doc "The first line: how much there is, and the last minute."
  @spec headline(t()) :: String.t()
  def headline(%{recent: nil} = summary), do: quantity(summary.events, "event")

  def headline(%{recent: recent} = summary) do
    rate = "#{fixed(recent.commands_per_s, 1)} commands/s, #{fixed(recent.errors_per_s, 1)} errors/s in the last minute"

    strange =
      if summary.unknown + summary.refused > 0, do: ", #{summary.unknown} unknown, #{summary.refused} refused", else: ""

    quantity(summary.events, "event") <> strange <> " · " <> rate
  end

  defp latency(row) do
    [row.command, thousands(row.count), thousands(row.errors)] ++
      Enum.map([row.p50, row.p95, row.p99, row.queue_p95, row.kernel_p50], &time/1) ++ [thousands(row.retries)]
  end

  defp error(row) do
    [{about, _count} | _] = row.about
    [row.error, Atom.to_string(row.of), thousands(row.count), about]
  end

  defp kernel(row) do
    memory = if row.rss > 0, do: "#{thousands(div(row.rss, 1024 * 1024))} MiB", else: ""
    id = String.slice(row.kernel, 0, 8)
    process = if row.pid, do: Integer.to_string(row.pid), else: ""
    numbers = Enum.map([row.commands, row.errors], &thousands/1)
    [id, process, Atom.to_string(row.state)] ++ numbers ++ [memory, thousands(row.lost), row.reason]
  end

  defp model(row) do
    cost = if row.cost > 0, do: "$" <> fixed(row.cost, 4), else: ""
    numbers = Enum.map([row.calls, row.errors, row.cache_hits, row.tokens], &thousands/1)
    [row.model | numbers] ++ [cost, time(row.p50), time(row.p95)]
  end

  defp time(nil), do: ""
  defp time(ns), do: duration(ns)

  defimpl Inspect do
    alias Bridge.Telemetry.Summary

    def inspect(summary, _opts) do
      tables =
        for {title, columns, rows} <- Summary.tables(summary) do
          "\n\n" <> title <> "\n" <> Table.text(columns, rows)
        end

      "#Bridge.Telemetry<" <> Summary.headline(summary) <> ">" <> Enum.join(tables)
    end
  end
end
