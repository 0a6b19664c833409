defmodule Bridge.Command.Answer do
  @moduledoc false
  # What a kernel answered, as the host's own: the result, and what it changes of an instance.

  alias Bridge.{Config, Error, Request, Value}

  @typedoc "Whose it is."
  @type owner :: %{:session => String.t(), :cfg => Config.t(), optional(any()) => any()}

  @doc "The result of the command, and the store's operations that it asks for. `:internal_error` if it does not fit."
  @spec read(Request.t(), map(), [binary()], owner()) :: {:ok, term(), [tuple()]} | {:error, Error.t()}
  def read(%{method: "instance.create", instance: record}, %{"state" => %{} = kept} = result, buffers, owner) do
    with {:ok, kept, nil} <- state_of(kept, [], buffers, owner) do
      made = Map.merge(record, %{state: kept, version: 1, methods: strings(result["methods"])})
      ref = %Bridge.Ref{id: record.ref, class: record.class, version: 1, session: owner.session, bridge: owner.cfg.name}
      {:ok, ref, [{:instance, made, nil}]}
    end
  end

  def read(%{method: "instance.create"}, _result, _buffers, _owner), do: misfit("an instance has no state")

  def read(%{method: "object.inspect"}, result, _buffers, _owner) do
    case Bridge.Inspected.read(result) do
      {:ok, inspected} -> {:ok, inspected, []}
      :error -> misfit("that is no description")
    end
  end

  def read(%{method: method}, result, _buffers, _owner)
      when method != "function.stream" and not is_map_key(result, "value"),
      do: misfit("it has no value")

  def read(%{instance: %{} = record}, result, buffers, owner) do
    with {:ok, kept, value} <- state_of(result["state"], [{"result", result["value"]}], buffers, owner) do
      changed = kept && %{record | state: kept, version: record.version + 1}
      {:ok, value, if(changed, do: [{:instance, changed, record.version}], else: [])}
    end
  end

  def read(_prepared, result, buffers, owner) do
    with {:ok, value} <- Value.decode(result["value"], buffers, path: "result", hook: hook(owner)), do: {:ok, value, []}
  end

  defp misfit(why), do: Error.error(:internal_error, "the kernel's answer does not fit the contract: #{why}")

  defp strings(list) when is_list(list), do: Enum.filter(list, &is_binary/1)
  defp strings(_none), do: []

  defp state_of(nil, values, buffers, owner) do
    with {:ok, values} <- Value.decode_many(values, buffers, hook: hook(owner)), do: {:ok, nil, List.first(values)}
  end

  defp state_of(%{"adapter" => adapter} = kept, values, buffers, owner) when is_binary(adapter) do
    # A ref within a state is the kernel's: it goes back as it came.
    with {:ok, digest} <- digest_of(kept),
         {:ok, [inner | values]} <-
           Value.decode_many([{"state", kept["value"]} | values], buffers, hook: hook(owner)) do
      {:ok, %{adapter: adapter, value: inner, sha256: digest}, List.first(values)}
    end
  end

  defp state_of(_other, _values, _buffers, _owner), do: misfit("its state has no adapter")

  defp digest_of(%{"sha256" => digest}) when is_binary(digest) or digest == nil, do: {:ok, digest}
  defp digest_of(kept) when not is_map_key(kept, "sha256"), do: {:ok, nil}
  defp digest_of(_kept), do: misfit("its state's sha256 is no text")

  @doc "For `Bridge.Value`: a ref that comes from a kernel becomes one that knows whose it is."
  @spec hook(owner()) :: (struct() -> struct())
  def hook(%{session: session, cfg: %{name: bridge}}) do
    fn
      %Bridge.Ref{} = ref -> %{ref | session: session, bridge: bridge}
      other -> other
    end
  end
end
