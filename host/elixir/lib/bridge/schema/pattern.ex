defmodule Bridge.Schema.Pattern do
  # Regular expressions of a schema (ECMA 262) as PCRE takes them, in bounded time.
  @moduledoc false

  # Steps of the matcher, not characters: what a sane pattern takes for a megabyte of text.
  @max_steps 1_000_000
  @max_depth 100_000

  @spec compile(String.t()) :: {:ok, term()} | {:error, String.t()}
  # There `$` is the very end, not before a newline too.
  def compile(pattern) do
    case :re.compile(pattern, [:unicode, :dollar_endonly]) do
      {:ok, compiled} -> {:ok, compiled}
      {:error, {reason, at}} -> {:error, "#{reason} at #{at}"}
    end
  end

  @doc "Whether it occurs in the text; `:unknown` if finding out takes too long."
  @spec match?(String.t(), String.t()) :: boolean() | :unknown
  def match?(pattern, text) do
    {:ok, compiled} = compile(pattern)

    case :re.run(text, compiled, [
           :report_errors,
           match_limit: @max_steps,
           match_limit_recursion: @max_depth,
           capture: :none
         ]) do
      :match -> true
      :nomatch -> false
      {:error, _limit} -> :unknown
    end
  end
end
