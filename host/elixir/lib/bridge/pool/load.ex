defmodule Bridge.Pool.Load do
  @moduledoc false
  # What runs on one kernel, and how long a command would take beside it. A value: who calls says what time it is, in
  # microseconds.
  #
  # A kernel runs its commands at once, under one lock. Those that compute share it: beside one other, each takes twice
  # as long. Those that wait (for a model, a tool, a disk) slow nobody and are slowed by nobody. Which kind a command is
  # of (see `Bridge.Pool.Kinds`) shows in its durations: whether they stay the same however many others there are.
  #
  # Bounded: of the commands, the one that was longest unused is forgotten.

  alias Bridge.Pool.{Kinds, Recent}

  # Of the newest duration in a moving average.
  @weight 0.2
  @stale_us 30_000_000
  @most_commands 4096
  # Python's switch interval: who is done sooner than that waits for it all the same where somebody computes.
  @slice_us 5_000

  defstruct mean: 0.0,
            known: Recent.new(@most_commands),
            at: 0,
            # Microseconds of computing that a command had which was there all the time.
            served: 0.0,
            # How many commands were there, summed up over time.
            crowd: 0.0,
            jobs: 0,
            # Of what is in flight: how many compute, the sum of what they were expected to take alone, and of `served`
            # when they began.
            computing: 0,
            work: 0.0,
            since: 0.0

  @type t :: %__MODULE__{}
  @typedoc "A command that runs on a kernel. It is given back once, to `finish/5`."
  @type job :: %{
          command: String.t(),
          began: integer(),
          served: float(),
          crowd: number(),
          work: float(),
          computes: boolean(),
          trial: boolean()
        }

  @doc "`mean` is how long a command takes of which nothing is known; 0 if that is not known either."
  @spec new(number()) :: t()
  def new(mean \\ 0.0), do: %__MODULE__{mean: mean * 1.0}

  @doc "The command is sent there."
  @spec begin(t(), Kinds.t(), String.t(), integer()) :: {t(), job()}
  def begin(load, kinds, command, now) do
    load = advance(load, now)
    computes = not Kinds.waits?(kinds, command)

    {work, trial, known} =
      case Recent.get(load.known, command) do
        %{runs: runs} = entry when runs > 0 ->
          # Others wait for what comes of a trial.
          {entry.alone, now - entry.renewed >= @stale_us, Recent.replace(load.known, command, %{entry | renewed: now})}

        _ ->
          {load.mean, false, load.known}
      end

    job = %{
      command: command,
      began: now,
      served: load.served,
      crowd: load.crowd,
      work: work,
      computes: computes,
      trial: trial
    }

    load = %{load | jobs: load.jobs + 1, known: known}

    if computes do
      {%{load | computing: load.computing + 1, work: load.work + work, since: load.since + load.served}, job}
    else
      {load, job}
    end
  end

  @doc "The command has ended; `typical` unless it says nothing of how long the command takes."
  @spec finish(t(), Kinds.t(), job(), integer(), boolean()) :: {t(), Kinds.t()}
  def finish(load, kinds, job, now, typical) do
    load = %{advance(load, now) | jobs: load.jobs - 1}

    load =
      cond do
        not job.computes -> load
        # From zero again, so that no rounding adds up.
        load.computing == 1 -> %{load | computing: 0, work: 0.0, since: 0.0}
        true -> %{load | computing: load.computing - 1, work: load.work - job.work, since: load.since - job.served}
      end

    took = now - job.began

    {load, kinds} =
      if typical and took > 0 do
        alone = if job.computes, do: load.served - job.served, else: took * 1.0
        record(load, kinds, job.command, alone, now, took, (load.crowd - job.crowd) / took, job.trial)
      else
        {load, kinds}
      end

    {if(load.jobs == 0, do: %{load | served: 0.0, crowd: 0.0}, else: load), kinds}
  end

  defp advance(load, now) do
    past = now - load.at
    served = load.served + past / max(load.computing, 1)
    %{load | at: now, served: served, crowd: load.crowd + past * load.jobs}
  end

  # It took `took`, beside so many commands that it would have taken `alone` without those that compute; `crowd` is how
  # many there were, itself included. After a trial what was before is forgotten.
  defp record(load, kinds, command, alone, now, took, crowd, trial) do
    known = Recent.get(load.known, command)

    if known == nil do
      # The first run pays for imports and caches: to judge by it would shun a kernel for what it has behind it.
      {%{load | known: Recent.put(load.known, command, unknown(now))}, kinds}
    else
      known = if trial, do: unknown(now), else: known
      longer = took - known.took
      fuller = crowd - known.crowd

      kinds = if known.runs > 0, do: Kinds.add(kinds, command, longer / known.took, fuller / known.crowd), else: kinds

      runs = known.runs + 1
      steady = max(Kinds.weight(), 1 / runs)

      known = %{
        runs: runs,
        took: known.took + steady * longer,
        crowd: known.crowd + steady * fuller,
        alone: known.alone + max(@weight, 1 / runs) * (alone - known.alone),
        renewed: now
      }

      mean = if load.mean > 0, do: load.mean + @weight * (alone - load.mean), else: alone
      {%{load | mean: mean, known: Recent.put(load.known, command, known)}, kinds}
    end
  end

  defp unknown(now), do: %{runs: 0, took: 0.0, crowd: 0.0, alone: 0.0, renewed: now}

  @doc "How long it takes alone; 0 if that is not known, or has not been seen for so long that it is worth another try."
  @spec of(t(), String.t(), integer()) :: float()
  def of(load, command, now) do
    case Recent.get(load.known, command) do
      %{renewed: renewed, alone: alone} when now - renewed < @stale_us -> alone
      _ -> 0.0
    end
  end

  @doc "How much longer than `alone`, which it takes alone, it would take because of what runs there."
  @spec ahead(t(), Kinds.t(), String.t(), number(), integer()) :: float()
  def ahead(%{computing: computing} = load, kinds, command, alone, now) do
    if computing == 0 or Kinds.waits?(kinds, command) do
      0.0
    else
      served = load.served + (now - load.at) / computing
      # What was expected, less what they have had. Who is overdue is expected to need as much again as it is overdue.
      left = abs(load.work - (computing * served - load.since))
      # Where all get the same, each of the others gets no more meanwhile than the command itself does.
      min(computing * max(alone, @slice_us) * 1.0, left)
    end
  end

  @doc "How long the command would take here, in microseconds; 0 if nothing is known."
  @spec expected(t(), Kinds.t(), String.t(), integer()) :: float()
  def expected(load, kinds, command, now) do
    alone =
      case of(load, command, now) do
        known when known > 0 -> known
        _unknown -> load.mean
      end

    alone + ahead(load, kinds, command, alone, now)
  end
end
