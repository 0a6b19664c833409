defmodule Bridge.Pool.Breaker do
  @moduledoc false
  # Circuit breakers: a command that keeps failing its kernels is kept off them for a while. A value: the clock is the
  # caller's, in microseconds.
  #
  # There is a circuit for each command over all kernels, and one for each kernel and command. They open after so many
  # failures in a row, and for how long doubles each time, up to 5 minutes. A failure is one of the kernel's: it died,
  # or let a deadline pass without a word. With `error_rate` the errors of a command's own code count too: it is held back
  # as soon as at least that share of its last `error_window` calls failed, on whatever kernel.

  alias Bridge.Error
  alias Bridge.Pool.{Recent, Window}

  @last_cooldown_us 300_000_000
  @most_circuits 4096
  @largest_window 1_000
  @defaults %{kernel_failures: 3, command_failures: 5, cooldown: 10_000, error_rate: nil, error_window: 20}

  @enforce_keys [:settings]
  defstruct [
    :settings,
    circuits: Recent.new(@most_circuits),
    deaths: Recent.new(@most_circuits),
    windows: Recent.new(@most_circuits)
  ]

  @type t :: %__MODULE__{}
  @typedoc "`:error` is an error of its own code, `:refused` one of whoever asked for it, `:died` and `:timeout` are its kernel's."
  @type outcome :: :ok | :error | :refused | :died | :timeout | :cancelled
  @typedoc "A circuit opened or closed; `kernel` is \"\" for the command's circuit over all kernels."
  @type change :: %{
          opened: boolean(),
          command: String.t(),
          kernel: term(),
          failures: non_neg_integer(),
          cooldown_us: non_neg_integer(),
          reason: String.t()
        }

  @doc "`settings` replace the defaults; nil is a breaker that never opens."
  @spec new(map() | nil) :: t() | nil
  def new(nil), do: nil
  def new(settings), do: %__MODULE__{settings: Map.merge(@defaults, settings)}

  @doc "What is wrong with such settings, in words, or nil."
  @spec problem(map()) :: String.t() | nil
  def problem(settings) do
    Enum.find_value(settings, fn
      {name, value} when name in [:kernel_failures, :command_failures] ->
        unless is_integer(value) and value >= 1, do: "#{name} is a whole number, 1 or more, not #{inspect(value)}"

      {:cooldown, value} ->
        unless is_integer(value) and value in 1..div(@last_cooldown_us, 1_000),
          do: "cooldown is in milliseconds, 1 to #{div(@last_cooldown_us, 1_000)}, not #{inspect(value)}"

      {:error_rate, value} ->
        unless value == nil or (is_number(value) and value > 0 and value <= 1),
          do: "error_rate is a share, more than 0 and at most 1, or nil, not #{inspect(value)}"

      {:error_window, value} ->
        unless is_integer(value) and value in 1..@largest_window,
          do: "error_window is a whole number, 1 to #{@largest_window}, not #{inspect(value)}"

      {name, _value} ->
        "there is no #{inspect(name)}, but #{@defaults |> Map.keys() |> Enum.map_join(", ", &inspect/1)}"
    end)
  end

  @doc "How many circuits there are: with none, there is nothing to look up."
  @spec size(t() | nil) :: non_neg_integer()
  def size(nil), do: 0
  def size(breaker), do: Recent.size(breaker.circuits)

  @doc "Whether the command may run on some kernel; the error says for how long not."
  @spec check(t() | nil, String.t(), integer()) :: :ok | {:error, Error.t()}
  def check(nil, _command, _now), do: :ok

  def check(breaker, command, now) do
    case Recent.get(breaker.circuits, {"", command}) do
      %{until: until, probing: probing} = circuit when until != nil and (until > now or probing) ->
        failed =
          if circuit.why == "",
            do: "failed its kernels #{circuit.failures} times in a row",
            else: "fails too often (#{circuit.why} calls)"

        left = until - now
        then = if left > 0, do: "it is held back for #{seconds(left)} more", else: "one is tried now, the others wait"
        Error.error(:circuit_open, "#{command} #{failed}: #{then}")

      _ ->
        :ok
    end
  end

  @doc "Whether the command may go to that kernel."
  @spec admits?(t() | nil, term(), String.t(), integer()) :: boolean()
  def admits?(nil, _kernel, _command, _now), do: true

  def admits?(breaker, kernel, command, now) do
    case Recent.get(breaker.circuits, {kernel, command}) do
      %{until: until, probing: probing} when until != nil -> until <= now and not probing
      _ -> true
    end
  end

  @doc "The command is sent there. True if that is the probe of a half-open circuit: say so to `finish/6`."
  @spec begin(t() | nil, term(), String.t()) :: {t() | nil, boolean()}
  def begin(nil, _kernel, _command), do: {nil, false}

  def begin(breaker, kernel, command) do
    # Before its time, too: where no other kernel is left, the command went to one that is open.
    Enum.reduce([{"", command}, {kernel, command}], {breaker, false}, fn key, {breaker, probe} ->
      case Recent.get(breaker.circuits, key) do
        %{until: until, probing: false} = circuit when until != nil ->
          {replace(breaker, key, %{circuit | probing: true}), true}

        _ ->
          {breaker, probe}
      end
    end)
  end

  @doc "The command has ended: which circuits opened or closed."
  @spec finish(t() | nil, term(), String.t(), outcome(), boolean(), integer()) :: {t() | nil, [change()]}
  def finish(nil, _kernel, _command, _outcome, _probe, _now), do: {nil, []}

  def finish(breaker, kernel, command, :cancelled, probe, _now) do
    keys = if probe, do: [{"", command}, {kernel, command}], else: []

    breaker =
      Enum.reduce(keys, breaker, fn key, breaker ->
        case Recent.get(breaker.circuits, key) do
          nil -> breaker
          circuit -> replace(breaker, key, %{circuit | probing: false})
        end
      end)

    {breaker, []}
  end

  def finish(breaker, kernel, command, outcome, probe, now) do
    {breaker, counted} = count(breaker, command, outcome, probe, now)

    cond do
      outcome in [:ok, :error, :refused] ->
        # Whatever it says, it is a sign of life.
        {breaker, all} = close(breaker, "", command, outcome, probe)
        {breaker, one} = close(breaker, kernel, command, outcome, probe)
        {breaker, counted ++ all ++ one}

      outcome == :died and Recent.get(breaker.deaths, {kernel, command}) != nil and not probe ->
        # One death is one failure of a command, however many calls of it were in flight there.
        {breaker, counted}

      outcome == :died ->
        deaths = Recent.put(breaker.deaths, {kernel, command}, true)
        # That kernel never comes back.
        breaker = %{breaker | deaths: deaths, circuits: Recent.delete(breaker.circuits, {kernel, command})}
        fail_command(breaker, counted, command, outcome, probe, now)

      true ->
        {breaker, all} = fail_command(breaker, counted, command, outcome, probe, now)
        {breaker, one} = fail(breaker, kernel, command, breaker.settings.kernel_failures, outcome, probe, now)
        {breaker, all ++ one}
    end
  end

  @doc "That kernel has gone: its circuits go with it."
  @spec forget(t() | nil, term()) :: t() | nil
  def forget(nil, _kernel), do: nil

  def forget(breaker, kernel) do
    circuits =
      for {^kernel, _command} = key <- Recent.keys(breaker.circuits), reduce: breaker.circuits do
        circuits -> Recent.delete(circuits, key)
      end

    %{breaker | circuits: circuits}
  end

  # -- failures -----------------------------------------------------------------------------

  defp fail_command(breaker, [], command, outcome, probe, now),
    do: fail(breaker, "", command, breaker.settings.command_failures, outcome, probe, now)

  defp fail_command(breaker, counted, _command, _outcome, _probe, _now), do: {breaker, counted}

  defp fail(breaker, kernel, command, threshold, outcome, probe, now) do
    circuit = Recent.get(breaker.circuits, {kernel, command}) || new_circuit(breaker)
    {circuit, opened} = failed(circuit, threshold, probe, now)
    breaker = store(breaker, {kernel, command}, circuit)
    {breaker, if(opened, do: [opening(kernel, command, circuit, Atom.to_string(outcome))], else: [])}
  end

  defp new_circuit(breaker),
    do: %{failures: 0, cooldown_us: breaker.settings.cooldown * 1_000, until: nil, probing: false, why: ""}

  defp failed(circuit, threshold, probe, now) do
    circuit = %{circuit | failures: circuit.failures + 1}

    cond do
      circuit.until == nil and circuit.failures < threshold ->
        {circuit, false}

      circuit.until == nil ->
        {%{circuit | until: now + circuit.cooldown_us}, true}

      probe ->
        cooldown = min(circuit.cooldown_us * 2, @last_cooldown_us)
        {%{circuit | cooldown_us: cooldown, probing: false, until: now + cooldown}, true}

      true ->
        # Sent before it opened: that says nothing new.
        {circuit, false}
    end
  end

  # Open the command's circuit if too many of its last calls have failed, or the probe of one that did so.
  defp count(%{settings: %{error_rate: nil}} = breaker, _command, _outcome, _probe, _now), do: {breaker, []}
  defp count(breaker, _command, :refused, _probe, _now), do: {breaker, []}
  defp count(breaker, _command, :died, false, _now), do: {breaker, []}

  defp count(breaker, command, outcome, probe, now) do
    case Recent.get(breaker.circuits, {"", command}) do
      %{until: until, why: why} = circuit when until != nil ->
        if probe and why != "" and outcome != :ok,
          do: open_by_rate(breaker, command, circuit, probe, now),
          else: {breaker, []}

      circuit ->
        count_in_window(breaker, command, circuit, outcome, probe, now)
    end
  end

  defp count_in_window(breaker, command, circuit, outcome, probe, now) do
    %{error_window: size, error_rate: rate} = breaker.settings
    window = Recent.get(breaker.windows, command)

    if window == nil and outcome == :ok do
      {breaker, []}
    else
      window = Window.add(window || Window.new(size), outcome != :ok)

      cond do
        Window.failures(window) == 0 ->
          {%{breaker | windows: Recent.delete(breaker.windows, command)}, []}

        window.length < size or Window.rate(window) < rate ->
          {%{breaker | windows: Recent.put(breaker.windows, command, window)}, []}

        true ->
          share = Window.rate(window) |> Float.round(2) |> Float.to_string()
          why = "error rate #{share} of the last #{size}"
          # `failed` counts this one.
          circuit = %{(circuit || new_circuit(breaker)) | why: why, failures: Window.failures(window) - 1}
          breaker = %{breaker | windows: Recent.delete(breaker.windows, command)}
          open_by_rate(breaker, command, circuit, probe, now)
      end
    end
  end

  defp open_by_rate(breaker, command, circuit, probe, now) do
    {circuit, true} = failed(circuit, 1, probe, now)
    {store(breaker, {"", command}, circuit), [opening("", command, circuit, circuit.why)]}
  end

  defp opening(kernel, command, circuit, reason) do
    %{
      opened: true,
      command: command,
      kernel: kernel,
      failures: circuit.failures,
      cooldown_us: circuit.cooldown_us,
      reason: reason
    }
  end

  defp close(breaker, kernel, command, outcome, probe) do
    key = {kernel, command}

    case Recent.get(breaker.circuits, key) do
      nil ->
        {breaker, []}

      %{why: why} = circuit when why != "" and not (probe and outcome == :ok) ->
        # A refusal says nothing about its code: the next one decides.
        probing = circuit.probing and not (probe and outcome == :refused)
        {replace(breaker, key, %{circuit | probing: probing}), []}

      circuit ->
        breaker = %{breaker | circuits: Recent.delete(breaker.circuits, key)}

        if circuit.until == nil do
          {breaker, []}
        else
          change = %{opening(kernel, command, circuit, Atom.to_string(outcome)) | opened: false, cooldown_us: 0}
          {breaker, [change]}
        end
    end
  end

  defp store(breaker, key, circuit), do: %{breaker | circuits: Recent.put(breaker.circuits, key, circuit)}
  defp replace(breaker, key, circuit), do: %{breaker | circuits: Recent.replace(breaker.circuits, key, circuit)}

  defp seconds(us) when us < 10_000_000, do: "#{Float.round(us / 1_000_000, 2)} s"
  defp seconds(us), do: "#{div(us, 1_000_000)} s"
end
