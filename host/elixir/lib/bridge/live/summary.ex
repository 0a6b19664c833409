defmodule Bridge.Live.Summary do
  @moduledoc """
  Many commands in one line: as text and as HTML, the same as the Python host's. Durations in nanoseconds.

      iex> Bridge.Live.Summary.text(%Bridge.Live.Summary{ok: 1200, failed: 1, p50: 1_500_000, p95: 12_000_000})
      "1,201 commands · 1,200 ✓ · 1 ✗ · p50 1.5 ms · p95 12.0 ms"
  """

  import Bridge.Live.Words

  @enforce_keys [:ok, :failed]
  defstruct [:ok, :failed, running: 0, p50: nil, p95: nil, lm_calls: 0, tokens: 0, elapsed: 0]

  @type t :: %__MODULE__{
          ok: non_neg_integer(),
          failed: non_neg_integer(),
          running: non_neg_integer(),
          p50: non_neg_integer() | nil,
          p95: non_neg_integer() | nil,
          lm_calls: non_neg_integer(),
          tokens: non_neg_integer(),
          elapsed: non_neg_integer()
        }

  @doc "One line, without a newline."
  @spec text(t()) :: String.t()
  def text(summary), do: Enum.map_join(parts(summary), " · ", &elem(&1, 1))

  @doc "The same, coloured."
  @spec html(t()) :: String.t()
  def html(summary) do
    [{_, first} | rest] = parts(summary)
    dim = &~s(<span style="opacity:.75">#{&1}</span>)
    said = for {state, part} <- rest, do: if(state, do: coloured(state, part), else: dim.(part))
    framed(Enum.join(["<b>#{first}</b>" | said], dim.(" · ")))
  end

  # Each with the state whose colour it has.
  defp parts(s) do
    percentiles? = s.p50 != nil and s.p95 != nil

    Enum.filter(
      [
        {nil, quantity(s.ok + s.failed + s.running, "command")},
        s.ok > 0 && {:ok, "#{thousands(s.ok)} ✓"},
        s.failed > 0 && {:error, "#{thousands(s.failed)} ✗"},
        s.running > 0 && {:running, "#{mark(:running, s.elapsed)} #{thousands(s.running)} running"},
        percentiles? && {nil, "p50 #{duration(s.p50)}"},
        percentiles? && {nil, "p95 #{duration(s.p95)}"},
        s.lm_calls > 0 && {nil, quantity(s.lm_calls, "LM call")},
        s.tokens > 0 && {nil, quantity(s.tokens, "token")}
      ],
      & &1
    )
  end
end
