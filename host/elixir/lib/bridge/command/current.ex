defmodule Bridge.Command.Current do
  @moduledoc false
  # The command for which a tool runs in this process: what it sends itself is nested in that, and shares its budget.

  @enforce_keys [:bridge, :until, :depth, :keys, :call]
  defstruct @enforce_keys

  @type call :: %{id: String.t(), tool: String.t(), command: String.t(), session: String.t()}
  @type t :: %__MODULE__{
          bridge: atom(),
          until: number() | nil,
          depth: non_neg_integer(),
          keys: [{String.t(), String.t()}],
          call: call()
        }

  @key :bridge_current

  @doc "From now on the process that calls this is a tool's, for as long as it is."
  @spec put(t()) :: :ok
  def put(current) do
    Process.put(@key, current)
    {:ok, _registry} = Registry.register(keys(current.bridge), {:tool, self()}, current)
    :ok
  end

  @doc "Of that bridge: another one's commands are no part of it."
  @spec get(atom()) :: t() | nil
  def get(bridge) do
    case Process.get(@key) do
      %__MODULE__{bridge: ^bridge} = current -> current
      %__MODULE__{} -> nil
      nil -> of_callers(Process.get(:"$callers", []), bridge)
    end
  end

  @spec call() :: call() | nil
  def call do
    callers = Process.get(:"$callers", [])

    with nil <- Process.get(@key), nil <- Enum.find_value(Bridge.Config.running(), &of_callers(callers, &1)) do
      nil
    else
      %__MODULE__{call: call} -> call
    end
  end

  # A task that a tool starts works for the tool. Not looked up in that process: `process_info` of another one was seen to
  # wait for ever, its answer in the mailbox (OTP 25.2).
  defp of_callers(callers, bridge) do
    Enum.find_value(callers, fn pid ->
      with [{^pid, current}] <- Registry.lookup(keys(bridge), {:tool, pid}), do: current, else: (_none -> nil)
    end)
  end

  defp keys(bridge), do: Bridge.Config.process(bridge, :keys)
end
