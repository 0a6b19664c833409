defmodule Bridge.Store.Facts do
  @moduledoc false
  # What a batch of facts looks like (they are listed in `Bridge.Store.Tables`). A file is somebody else's: nothing of it
  # is taken that this host would not have written. And nothing is written that would not be taken, so both ask here.
  # What a command was asked, what its tools were asked and gave, and the arguments of instances may hold anything: they
  # are not looked into.

  # When a session was used is an atomic.
  @latest 0x7FFF_FFFF_FFFF_FFFF

  defguardp is_text(term) when is_binary(term) and term != ""
  defguardp is_text_or_nil(term) when is_binary(term) or term == nil
  defguardp is_count(term) when is_integer(term) and term >= 0
  defguardp is_positive(term) when is_integer(term) and term > 0
  defguardp is_time(term) when is_integer(term) and term >= -@latest and term <= @latest

  @doc "Whether these are facts; what is wrong with them says which is none."
  @spec check(term()) :: :ok | {:error, String.t()}
  # It takes effect at once, whatever else is said of the session in its batch.
  def check([{:session_gone, id}]) when is_text(id), do: :ok
  def check(facts), do: each(facts)

  defp each([fact | facts]), do: if(fact?(fact), do: each(facts), else: none(fact))
  defp each([]), do: :ok
  defp each(_facts), do: {:error, "it is no list of facts"}

  defp none(fact) when is_tuple(fact) and tuple_size(fact) > 0 and is_atom(elem(fact, 0)),
    do: {:error, "this is no fact of the kind #{inspect(elem(fact, 0), printable_limit: 60)}"}

  defp none(_fact), do: {:error, "it holds what is no fact"}

  @doc "What need not be looked at again when it is written: that values are data, and a source is the one it says it is."
  @spec sound([tuple()]) :: :ok | {:error, String.t()}
  def sound(facts) do
    case Enum.find(facts, &(not sound?(&1))) do
      nil -> :ok
      fact -> none(fact)
    end
  end

  defp fact?({:session, id, %{created: created, used: used, ttl: ttl, version: version, lm: lm} = put})
       when is_text(id) and is_time(created) and is_time(used) and (ttl == nil or is_positive(ttl)) and
              is_count(version) and map_size(put) == 5,
       do: String.valid?(id) and lm?(lm)

  defp fact?({:variable, id, name, %{there: true, version: version, type: type, size: size, value: _} = put})
       when is_text(id) and is_text(name) and is_positive(version) and is_binary(type) and is_count(size),
       do: put?(put) and String.valid?(name)

  defp fact?({:variable, id, name, %{there: false, version: version, type: nil, size: 0, value: nil} = put})
       when is_text(id) and is_text(name) and is_positive(version),
       do: put?(put) and String.valid?(name)

  defp fact?({:type, id, name, schema})
       when is_text(id) and is_text(name) and (schema == nil or (is_map(schema) and not is_struct(schema))),
       do: String.valid?(name)

  defp fact?({:instance, id, record}) when is_text(id), do: record?(record)
  defp fact?({:function, id, function}) when is_text(id), do: function?(function)
  defp fact?({:secret, id, name, sealed}), do: is_text(id) and is_text(name) and is_binary(sealed)
  defp fact?({:result, id, key, result}) when is_text(id) and is_text(key), do: result?(result)

  defp fact?({kind, id, name}) when kind in [:instance_gone, :function_gone, :secret_gone, :result_gone],
    do: is_text(id) and is_text(name)

  defp fact?({:begun, command}),
    do: command?(command) and command.status in [:running, :interrupted] and params?(command)

  defp fact?({:tried, id, attempt}), do: is_text(id) and is_positive(attempt)
  defp fact?({:kept, id, error}), do: is_text(id) and is_atom(error)
  defp fact?({:called, id, n, call}) when is_text(id) and is_positive(n), do: call?(call)
  defp fact?({:answered, id, n, reply}), do: is_text(id) and is_positive(n) and kept?(reply)
  defp fact?({:calls_gone, id, numbers}), do: is_text(id) and all?(numbers, &is_positive/1)

  defp fact?({:ended, id, outcome, at}) when is_text(id) and is_time(at),
    do: outcome == :ok or match?({:error, name} when is_atom(name), outcome)

  defp fact?({:remembered, %{status: :ended, ended: ended, calls: calls} = command})
       when is_time(ended) and is_count(calls),
       do: command?(command)

  defp fact?({:forgotten, id}), do: is_text(id)
  defp fact?(_other), do: false

  defp put?(%{at: at, written: written, restores: restores} = put)
       when is_count(at) and is_time(written) and (restores == nil or is_integer(restores)),
       do: map_size(put) == 8

  defp put?(_put), do: false

  defp lm?(nil), do: true

  defp lm?(%{model: model, api_base: api_base, adapter: adapter, options: options}),
    do: is_binary(model) and is_text_or_nil(api_base) and is_text_or_nil(adapter) and object?(options)

  defp lm?(_other), do: false

  defp record?(%{ref: ref, class: class, args: args, kwargs: kwargs, state: state, name: name} = record)
       when is_text(ref) and is_text(class) and is_text_or_nil(name) do
    match?(%{version: version, methods: _, cache: _} when is_positive(version), record) and
      all?(args, fn _ -> true end) and object?(kwargs) and state?(state) and all?(record.methods, &is_binary/1) and
      seconds?(record.cache)
  end

  defp record?(_other), do: false

  defp state?(nil), do: true
  defp state?(%{adapter: adapter, value: _, sha256: digest}), do: is_binary(adapter) and is_text_or_nil(digest)
  defp state?(_other), do: false

  defp function?(%{name: name, source: source, hash: hash, lm: lm, secrets: secrets, cache: cache}) do
    is_text(name) and is_binary(source) and is_binary(hash) and is_boolean(lm) and all?(secrets, &is_binary/1) and
      seconds?(cache)
  end

  defp function?(_other), do: false

  defp result?(%{digest: _, value: {:sealed, sealed}, command: command, ended: ended}),
    do: is_binary(sealed) and is_text(command) and is_time(ended)

  defp result?(%{digest: _, value: _, command: command, ended: ended}), do: is_text_or_nil(command) and is_time(ended)
  defp result?(_other), do: false

  defp command?(%{id: id, session: session, method: method, subject: subject, key: key, digest: _} = command)
       when is_text(id) and is_text(session) and is_text_or_nil(method) and is_text_or_nil(subject) and
              is_text_or_nil(key) do
    case command do
      %{attempt: attempt, sealed: sealed, began: began, error: error, status: _} ->
        is_positive(attempt) and is_boolean(sealed) and is_time(began) and is_atom(error)

      %{} ->
        false
    end
  end

  defp command?(_other), do: false

  defp params?(%{params: params}), do: kept?(params)
  defp params?(_other), do: false

  defp call?(%{seq: seq, method: method, asked: asked, effect: effect}),
    do: (seq == nil or is_integer(seq)) and is_binary(method) and is_boolean(effect) and kept?(asked)

  defp call?(_other), do: false

  defp kept?({:sealed, sealed}), do: is_binary(sealed)
  defp kept?(_term), do: true

  defp seconds?(seconds), do: seconds == nil or (is_number(seconds) and seconds > 0)

  defp object?(map), do: is_map(map) and not is_struct(map) and all?(Map.keys(map), &is_binary/1)

  defp all?([item | rest], fits?), do: fits?.(item) and all?(rest, fits?)
  defp all?(rest, _fits?), do: rest == []

  defp sound?({:variable, _id, _name, put}), do: data?(put.value)
  defp sound?({:type, _id, _name, schema}), do: data?(schema)

  defp sound?({:function, _id, %{source: source, hash: hash}}),
    do: Base.encode16(:crypto.hash(:sha256, source), case: :lower) == hash

  defp sound?(_fact), do: true

  # Nothing that runs, and nothing that is of a process.
  defp data?(term) when is_binary(term) or is_number(term) or is_atom(term), do: true
  defp data?(list) when is_list(list), do: items?(list)
  defp data?(map) when is_map(map), do: items?(:maps.to_list(map))
  defp data?(tuple) when is_tuple(tuple), do: items?(Tuple.to_list(tuple))
  defp data?(_other), do: false

  defp items?([item | rest]), do: data?(item) and items?(rest)
  defp items?(rest), do: rest == []
end
