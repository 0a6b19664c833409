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

  @spec put(t()) :: term()
  def put(current), do: Process.put(@key, current)

  @doc "Of that bridge: another one's commands are no part of it."
  @spec get(atom()) :: t() | nil
  def get(bridge) do
    case Process.get(@key) || of_callers(Process.get(:"$callers", [])) do
      %__MODULE__{bridge: ^bridge} = current -> current
      _none -> nil
    end
  end

  @spec call() :: call() | nil
  def call, do: with(%__MODULE__{call: call} <- Process.get(@key) || of_callers(Process.get(:"$callers", [])), do: call)

  # A task that a tool starts works for the tool.
  defp of_callers(callers) do
    Enum.find_value(callers, fn pid ->
      with true <- node(pid) == node(), {:dictionary, dictionary} <- Process.info(pid, :dictionary) do
        Keyword.get(dictionary, @key)
      else
        _gone -> nil
      end
    end)
  end
end
