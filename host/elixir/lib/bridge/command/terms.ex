defmodule Bridge.Command.Terms do
  @moduledoc false
  # On which terms a command runs: until when, how often again, under which key, within which others.

  alias Bridge.{Config, Error}
  alias Bridge.Command.Current

  @max_nesting 64
  @max_key 255
  # 46 days: what a timer takes.
  @longest_ms 4_000_000_000
  # How long after its deadline a kernel may still say so itself.
  @late_ms 500
  # Handlers of telemetry are called there. A command needs them both: it would wait for who waits for it.
  @needed [{Bridge.Kernel, :init, 1}, {Bridge.Pool, :init, 1}]

  @enforce_keys [:until, :retries, :key, :depth, :keys]
  defstruct @enforce_keys

  @typedoc "`until` is of this BEAM's monotonic clock, in ms; `keys` are those of the commands that it is nested in."
  @type t :: %__MODULE__{
          until: number() | nil,
          retries: non_neg_integer(),
          key: String.t() | nil,
          depth: non_neg_integer(),
          keys: [{session :: String.t(), key :: String.t()}]
        }

  @doc "The terms that `opts` (`deadline` in ms, `retries`, `idempotency_key`) and whoever asks in this process make."
  @spec read(Config.t(), keyword()) :: {:ok, t()} | {:error, Error.t()}
  def read(cfg, opts) do
    {deadline, retries, key} = {opts[:deadline], Keyword.get(opts, :retries, cfg.retries), opts[:idempotency_key]}
    current = Current.get(cfg.name)

    cond do
      deadline != nil and not (is_number(deadline) and deadline > 0 and deadline <= @longest_ms) ->
        invalid(
          "deadline is how many milliseconds there are, more than 0 and at most #{@longest_ms}, not #{inspect(deadline)}",
          "Leave it out for none."
        )

      not (is_integer(retries) and retries >= 0) ->
        invalid("retries is how often a command may run again, 0 or more, not #{inspect(retries)}")

      key != nil and not (is_binary(key) and String.valid?(key) and String.length(key) in 1..@max_key) ->
        invalid(
          "an idempotency key is a string of 1 to #{@max_key} characters, not #{inspect(key, printable_limit: 80)}"
        )

      Process.get(:"$initial_call") in @needed ->
        Error.error(
          :invalid_params,
          "a handler of telemetry cannot run a command here: it is called by what runs commands",
          remedy: "Let it send a message to a process of yours, and call from there."
        )

      current != nil and current.depth >= @max_nesting ->
        Error.error(:limit_exceeded, "commands are nested #{current.depth + 1} deep, at most #{@max_nesting}",
          remedy: "A tool seems to call, through commands, itself."
        )

      current == nil and Registry.meta(Config.process(cfg.name, :keys), :closed) == {:ok, true} ->
        Error.error(:host_closed, "#{inspect(cfg.name)} is being stopped, and takes no more commands")

      true ->
        until = [deadline && now() + deadline, current && current.until] |> Enum.filter(& &1) |> Enum.min(fn -> nil end)
        depth = if current, do: current.depth + 1, else: 0
        keys = if current, do: current.keys, else: []
        {:ok, %__MODULE__{until: until, retries: retries, key: key, depth: depth, keys: keys}}
    end
  end

  defp invalid(message), do: Error.error(:invalid_params, message)
  defp invalid(message, remedy), do: Error.error(:invalid_params, message, remedy: remedy)

  @doc "How many ms are left, 0 if none; nil without a deadline."
  @spec left(t()) :: number() | nil
  def left(%{until: nil}), do: nil
  def left(terms), do: max(terms.until - now(), 0)

  @spec out_of_time?(t()) :: boolean()
  def out_of_time?(terms), do: left(terms) == 0

  @doc "How long to wait for a kernel that may say itself that the time is up, in whole ms."
  @spec patience(t()) :: timeout()
  def patience(terms), do: if(left = left(terms), do: round(left) + @late_ms, else: :infinity)

  @doc "Whether two commands that have the key, known by their digests, are one."
  @spec check_same(String.t(), binary(), binary()) :: :ok | {:error, Error.t()}
  def check_same(_key, digest, digest), do: :ok

  def check_same(key, _known, _digest) do
    Error.error(:conflict, "the idempotency key #{inspect(key)} was used for another command",
      remedy: "One key names one command with its arguments: choose another.",
      retryable: false
    )
  end

  defp now, do: System.monotonic_time(:millisecond)
end
